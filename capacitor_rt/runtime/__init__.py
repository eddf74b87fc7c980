"""The fast path: folded weights, plans, and their execution by the Triton launches."""
