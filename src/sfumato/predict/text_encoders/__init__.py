"""Text encoders: networks with their tokenizers, a file each.

They are run by transformers, Latent Diffusion's by `ldm_bert`. Conditioners
(`predict/conditioners/`) decide which states of which encoder become `Conditioning`.
"""
