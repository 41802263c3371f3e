//! What the loss allocates: a few numbers a row, and the gradient; or no more logits than a tile.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
use common::{random, random_labels, random_probabilities};
use peak_alloc::PeakAlloc;
use rayon::ThreadPoolBuilder;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// The bytes that `f` held at most, beyond those that were held before.
fn peak<T>(f: impl FnOnce() -> Result<T>) -> Result<(T, usize)> {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = f()?;
    Ok((result, ALLOCATOR.peak_usage() - before))
}

/// One test, since the allocator counts for the whole process.
#[test]
fn no_more_is_allocated_than_has_to_be() -> Result<()> {
    nothing_of_the_logits_size_is_allocated_but_the_gradient()?;
    // On one thread, so that it is known which one has multiplied before.
    let pool = ThreadPoolBuilder::new().num_threads(1).build().expect("a thread pool");
    pool.install(of_logits_from_hidden_states_there_is_a_tile)
}

fn nothing_of_the_logits_size_is_allocated_but_the_gradient() -> Result<()> {
    const ROWS: usize = 32;
    const CLASSES: usize = 16_384;
    // A row keeps a label and some statistics, and the thread pool some blocks.
    const SMALL: usize = ROWS * 256 + 256 * 1024;

    let base = random(&[ROWS, CLASSES], 3., 1)?;
    let labels = random_labels(&[ROWS], CLASSES, 2)?;
    let probabilities = random_probabilities(&[ROWS, CLASSES], 1, 3)?.to_dtype(DType::F16)?;
    // The thread pool's own allocations come with its first use.
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    loss.forward(&base, &labels)?;

    for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
        let size = ROWS * CLASSES * dtype.size_in_bytes();
        let logits = Var::from_tensor(&base.to_dtype(dtype)?)?;
        let views: [(Tensor, Tensor); 2] = [
            (logits.as_tensor().clone(), probabilities.clone()),
            (logits.t()?, probabilities.t()?),
        ];
        for (class_dim, (view, probabilities)) in [1, 0].into_iter().zip(&views) {
            let loss = loss.clone().with_class_dim(class_dim);
            for targets in [&labels, probabilities] {
                let (result, forward) = peak(|| Ok(loss.forward(view, targets)?))?;
                assert!(forward < SMALL, "{dtype:?} forward: {forward} bytes");

                // candle makes a tensor of zeros for each gradient and a third for their sum; the
                // gradient through a transposed view is added up once more.
                let gradients = if class_dim == 1 { 3 } else { 5 };
                let (_, backward) = peak(|| result.backward())?;
                assert!(
                    backward < gradients * size + SMALL,
                    "{dtype:?} backward: {backward} bytes, of {size} a gradient"
                );
            }
        }
    }
    Ok(())
}

const TILE: TileSize = TileSize { rows: 256, classes: 128 };

/// The bytes that `forward_linear` and its backward hold at most.
fn peaks(weight: &Tensor, rows: usize) -> Result<(usize, usize)> {
    let (classes, size) = weight.dims2()?;
    let hidden = Var::from_tensor(&random(&[rows, size], 1., 2)?.to_dtype(weight.dtype())?)?;
    let labels = random_labels(&[rows], classes, 3)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let (result, forward) =
        peak(|| Ok(testing::forward_linear_tiled(&loss, &hidden, weight, None, &labels, TILE)?))?;
    let (_, backward) = peak(|| result.backward())?;
    Ok((forward, backward))
}

fn of_logits_from_hidden_states_there_is_a_tile() -> Result<()> {
    let weight = Var::from_tensor(&random(&[1000, 4], 1., 1)?.to_dtype(DType::F32)?)?;
    let (classes, size) = weight.dims2()?;
    // A thread keeps a block as large as its cache from its first multiplication on: here, of the rows of one tile.
    peaks(&weight, TILE.rows)?;
    for rows in [512, 4096, 16_384] {
        let (forward, backward) = peaks(&weight, rows)?;
        // The logits of a tile, and what the multiplications pack of it.
        let tiles = 3 * TILE.rows * TILE.classes * size_of::<f32>();
        // A row has parts, twice while they are joined, and a label, a loss and statistics.
        let bound = tiles + 104 * rows;
        assert!(forward < bound, "{rows} rows, forward: {forward} bytes of {bound}");
        // All logits would be more.
        assert!(bound < rows * classes * size_of::<f32>());
        // First the gradients, with a tile; then what candle adds to zeros.
        let gradients = (rows + classes) * size * size_of::<f32>();
        let bound = (gradients + tiles).max(3 * gradients) + 128 * 1024;
        assert!(backward < bound, "{rows} rows, backward: {backward} bytes of {bound}");
    }

    let (rows, size) = (2048, 256);
    let weight = random(&[300, size], 1., 1)?.to_dtype(DType::BF16)?;
    peaks(&weight, TILE.rows)?;
    let (_, backward) = peaks(&weight, rows)?;
    // Of a half type there are first the sums in f32; with a tile's logits, weight and rows, what it adds to the sum, and
    // the sum, and blocks of the multiplication. Then the gradient, candle's zeros, and the sum of these.
    let piece = TILE.rows * size * size_of::<f32>();
    let (sums, gradient) = (4 * rows * size, 2 * rows * size);
    let bound = (sums + 5 * piece).max(3 * gradient + piece) + 256 * 1024;
    assert!(backward < bound, "bf16: {backward} bytes of {bound}");
    Ok(())
}
