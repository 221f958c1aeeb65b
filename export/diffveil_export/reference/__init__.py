"""The small latent diffusion model that ships as `reference-128`: its networks, in PyTorch."""
