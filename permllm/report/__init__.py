"""The comparison of methods: rows, table, figures."""
