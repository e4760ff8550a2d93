"""The Open Inference Protocol v2, `inference.GRPCInferenceService`: what clients of Triton and KServe speak.

T tokens, H hidden size, E experts, K choices per token.
"""
