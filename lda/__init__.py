"""LDA: Latent Distribution Alignment for domain-generalizable person re-identification."""

__version__ = "0.1.0"
