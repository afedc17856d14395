"""Commands for tables: `probdiff fit`, `impute` and `sample`, and rows of a table for `bound`.

A model of a table is a folder with what `probdiff.save` leaves and, beside it, `columns.json`, the
table's description. Rows come as CSV, a column by its name, in any order.

What is read is looked at before JAX is imported, so that a typo costs no seconds.
"""
