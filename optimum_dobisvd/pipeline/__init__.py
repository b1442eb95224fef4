"""A compression step by step: validate, collect, allocate, factorize, quantize, one function each over one `Job`."""
