"""Modules that compute from factors."""
