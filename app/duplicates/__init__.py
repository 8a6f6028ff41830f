"""The road out of duplicates: report them, guard the key, merge them with an undo, purge them.

Everything here takes an engine and a model with :class:`~app.get_or_create.GetOrCreateMixin`. It
works on the tables as the database has them: columns and references that the models do not know
count as well.
"""
