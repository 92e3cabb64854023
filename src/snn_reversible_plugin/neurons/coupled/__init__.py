"""The coupled reversible node of Lei et al. (arXiv 2308.08649)."""
