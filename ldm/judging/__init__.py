"""Functions on arrays that say how good pictures are.

From one picture to many:

    metrics    picture by picture: SSIM, PSNR, Dice
    fidelity   how far a set of pictures is from another: KID, Frechet, precision and recall
    audit      copies of training slices; slices in two splits
    anatomy    tissue, ventricles, symmetry: is it a brain
    planes     axial, coronal or sagittal, and what of the anatomy holds there
    texture    softness, islands of white matter, width of the cortex
    scales     at which size a classifier tells generated slices from people's
    blame      how far from people in units of their spread, and which stage is to blame
    faults     what the report would find: the smallest of planted faults
    usefulness   what is learned from drawn slices, tried on real people
    quiz       pairs for human eyes, and what their answers say
    schema     what stands in report.json, and how two of them are compared
    measures   what an evaluation measures with all of these: sets of slices in, facts out
"""
