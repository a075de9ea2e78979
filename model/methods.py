"""Importing this module registers every quantization method of the project."""

from model import dorefa, fatnn, lq, lsq, pact, xnor

__all__ = ["dorefa", "fatnn", "lq", "lsq", "pact", "xnor"]
