"""What a report says of its figures and tables."""

CHOICE = (
    " Not every setting is drawn, for the sweep has more than six: one of each estimator (of VQ-VAE one of each "
    "gradient), at C = 64 and K = 16 as in the paper if it is there, and of several the one of lowest mean bits/dim; "
    "then the lowest of the rest, until they are six."
)
PAPER = " Grey lines and the star are the paper's numbers."
CHOSEN = ("figure_1b", "figure_1c", "figure_2", "codes", "pictures")
"""the figures that show single settings"""
CODEBOOKS = ("figure_1b", "figure_2")
"""those of them that choose among the settings that have codes"""
SEVERAL = (
    "The mean over trainings that differ in their seed alone, ± its standard error over these trainings. Settings "
    "that lack a training stand behind the others, for the mean of those that are left is a luckier one. Above "
    "lowest: the difference from the first row's, over the seeds that both have. A 95% interval is ± 12.7 standard "
    "errors for two common seeds, 4.3 for three, 2.8 for five, 2.3 for ten. The lowest was picked by these numbers: "
    "of settings that are equal, more than 5 in 100 lie beyond it, 9 with eight settings and three seeds."
)
FIGURES = {
    "figure_1a": (
        "Figure 1(a): bits/dim against C",
        "Single-sample ELBO of each trained model over every image of the split: the mean over seeds, and "
        "their range as a bar, of a continuous latent variable as a band; of a single seed it is ± the standard "
        "error over the images. What is at the same C stands side by side. Where there are more than six settings "
        "beside C and K, those of an estimator (of VQ-VAE those of a gradient) look the same, and the legend says "
        "how many they are: none is chosen.",
    ),
    "figure_1b": (
        "Figure 1(b): how many dimensions the codes use",
        "Cumulative fraction of a codebook's variance in its first principal components: the mean over the "
        "codebooks, and their range. Left, every code counts the same; right, each is weighted by how often "
        "it was used, so that dead codes do not count: they stay where they were, or with moving averages shrink to "
        "the origin. Curves that coincide are drawn ever thinner, one on the other.",
    ),
    "figure_1c": (
        "Figure 1(c): rate and distortion along training",
        "Each point is an evaluation on every image of the split; arrows show the direction, large marks the "
        "end. Along a grey line bits/dim, the sum of both, is the same. Faint paths, to hollow marks, have the rate "
        "that the same codes would cost under their own frequencies, the best prior that all positions share: the "
        "trained prior follows these with a lag, so that the rate may fall while the codes tell more.",
    ),
    "figure_2": (
        "Figure 2: the codes",
        "Rows are trials, of several seeds the first, columns their first latent variables; points are codes, "
        "projected on the first three principal components of all codes of that codebook, each of which counts the "
        "same: where most were never used, these decide the axes. ± is how far the three axes reach. Colour is a "
        "code's norm; rings are codes that were never used.",
    ),
    "codes": (
        "What the codes stand for",
        "The most used codes of the first latent variables of each trial, of several seeds the first: the mean of "
        "the 12×12 pixels of the images round the 4×4 where a code is chosen, less the mean of all such patches, in "
        "the contrast that stands beside the row; over each code how often it is chosen, at least a hundredth as "
        "often as the first. It is what images have there, and not what this code alone tells: codes of other latent "
        "variables go together with it.",
    ),
    "pictures": (
        "Reconstructions and samples",
        "The first images of the split; a row a trial, of several seeds the first, the mean of p(x|z) at a hard "
        "sample z ~ q(z|x) of each; and the mean of p(x|z) for draws from the prior, which is factorial: it knows "
        "how often a code occurs, and nothing of which go together; or from an AR prior, an autoregressive one, "
        "where the trial has it.",
    ),
}
