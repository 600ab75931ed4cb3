"""The formats of engines that load safetensors: compressed-tensors, GPTQ, AutoRound."""
