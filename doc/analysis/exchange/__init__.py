"""Checkpoints of other programs, for doc/analysis/convert.py. Needs numpy and h5py, and no PyTorch.

model.py        what all kinds have in common: tensors under Viaduct's names, settings, symbols, optimiser state
viaduct.py      Viaduct's checkpoints (doc/FILES.md)
safetensors.py  safetensors files
pickles.py      a reader of PyTorch's files that runs nothing of them
torch_files.py  a writer of PyTorch's zip files
optimizers.py   the state of PyTorch's optimisers
fair.py         checkpoints of facebookresearch/adaptive-span
xl.py           models of kimiyoung/transformer-xl
fairseq.py      checkpoints of fairseq's examples adaptive_span and truncated_bptt
fairseq_data.py a corpus as fairseq's binary data
"""
