"""Doors into other packages. Each file imports its own optional dependency; nothing else in the
house does.

A host with its own `BaseModelLoader` needs three lines:

    from awq.integrations.emb_model_provider import AutoAWQLoader
    loader = AutoAWQLoader(model_name, model_path=quantized_directory)
    model, tokenizer = loader.load_model()
"""
