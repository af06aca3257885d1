"""What a decoder block computes between its linears: rotary embedding, norms of heads, the gated activation."""
