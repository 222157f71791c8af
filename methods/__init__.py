"""Cache methods: what stays on the GPU (residency) and what a query reads (read), over one paged store."""
