"""Slices out of archives.

From bytes to what a network sees, in reading order:

    archive     the bytes of a named file in a zip or a folder; is it a picture
    volumes     NIfTI, MGZ and Analyze volumes, and DICOM series, as stacks of slices
    dicom       the series in a folder of DICOM files
    words       what one file or folder name says of itself
    copies      names that count copies of a picture before the mark
    folders     what the folders above a file say of it
    freesurfer  which volume of a FreeSurfer folder is used
    names       what the names of an archive say together: person, scan, slice, label, split; what is left out
    visits      which names are scans of one person
    people      what names must not say; who goes into a split that is missing
    table       what labels.csv says of people
    pixels      a picture decoded, fitted to a square, augmented
    single      one file by itself, of whomever it is
    masks       tissue masks, and how much of each place of the latents each tissue covers
    repeats     who was scanned twice, and which stacks change heads, by their looks
    centring    heads in the middle of the picture
    crop        the part of the pictures where brains lie
    order       which slice comes when
    latents     the file of what a first stage has encoded, and batches out of it
    phantom     brains with known anatomy, drawn from formulas
"""
