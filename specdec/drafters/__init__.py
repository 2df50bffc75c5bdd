"""One file per way to guess; ``specdec.draft.Drafter`` is the contract."""
