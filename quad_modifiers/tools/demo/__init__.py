"""A demonstration on real models that come from package registries: fetch, compress, reload, compare."""
