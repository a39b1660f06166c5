"""Text encoders: networks with their tokenizers, a file each, run by transformers or by `ldm_bert`.

Conditioners (`predict/conditioners/`) decide which states of which encoder become `Conditioning`.
"""
