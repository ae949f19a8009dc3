"""Everything that scores a response: accuracy by kind, format, language, length, reward models, judges; composed by the
config and run on a pool.
"""
