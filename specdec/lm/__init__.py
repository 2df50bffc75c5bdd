"""Models with caches. ``base`` is the contract, ``native`` runs our GPT, ``hf`` any Hugging Face causal LM."""
