"""From files to batches, in bounded memory and in one order. The rooms, in reading order:

encodings.py      bytes in another encoding → UTF-8
unpack.py         a file, compressed or not → its bytes
lines.py          bytes → lines, or parts of a plain text
tables.py         tables (CSV, TSV) and JSON arrays → records
columns.py        Parquet, Arrow and saved data sets → rows
records.py        files → records, one at a time, and the count of those that cannot be used
chats.py          messages → turns
conversations.py  records → pairs and chats, under whatever keys they are
templates.py      the templates by name, and the one that fits the data
examples.py       pairs and chats → ids, all of a data set
written.py        pairs and chats → records again
shards.py         a file of pages that is being read, from any point on
stream.py         records of pages → documents, shuffled, epoch after epoch, from any point on
encode.py         documents → ids, by several processes, in one order
batches.py        examples, or ids of pages → batches, without end
split.py          which conversations are held out
survey.py         how many records a corpus has, how long they are, and what cannot be used
duplicates.py     records that are there more than once: fingerprints, and what they have in common
findings.py       the kinds of findings of an audit, in words
checks.py         what can be wrong with a conversation
samples.py        a record token by token, as it trains
examine.py        what is seen in conversations, one at a time
audit.py          what a data set teaches: counts, findings, samples
"""
