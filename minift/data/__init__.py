"""From files to batches, in bounded memory and in one order. The rooms, in reading order:

encodings.py bytes in another encoding → UTF-8
unpack.py    a file, compressed or not → its bytes
records.py   bytes → records, one at a time, and the count of those that cannot be used
tables.py    tables (CSV, TSV) and JSON arrays → records
pairs.py     records → instruction pairs
stream.py    records of pages → documents, shuffled, epoch after epoch, from any point on
encode.py    documents → ids, by several processes, in one order
batches.py   examples, or ids of pages → batches, without end
survey.py    how many records a corpus has, how long they are, and what cannot be used
"""
