"""How an embedding model is said again for export: token vectors of a decoder or an encoder, pooling, dense layers."""
