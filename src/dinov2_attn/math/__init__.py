"""Attention mathematics on tensors: softmax, masks, row selection and memory."""
