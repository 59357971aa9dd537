"""Arrays to files that people look at; the only wing that imports matplotlib.

From pictures to pages:

    figures      sheets, GIFs and tissue maps: pictures made of pictures
    charts       curves, scatter plots and histograms: pictures with axes
    report       report.html and the model card: how words, tables and pictures become one file
    looks        sections of that report on how slices look, and of what use they are
    pages        what an evaluation has measured, in sections of that report
    comparison   what the reports of several runs say, side by side
    quiz         which of two slices is drawn: a page for human eyes
"""
