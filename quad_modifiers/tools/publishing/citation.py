"""How to cite the method."""

PAPER_URL = "https://arxiv.org/abs/2503.19353"
BIBTEX = """@article{hu2025quad,
  title   = {QUAD: Quantization and Parameter-Efficient Tuning of LLM with Activation Decomposition},
  author  = {Hu, Yuxuan and Chen, Xiaodong and Li, Cuiping and Chen, Hong and Zhang, Jing},
  journal = {arXiv preprint arXiv:2503.19353},
  year    = {2025}
}"""
