"""The only place that touches other libraries' private parts, few and commented."""
