//! Peak memory: `forward` and backward allocate some numbers per row and the gradient,
//! `forward_linear` one tile of logits.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
use common::{random, random_labels, random_probabilities};
use peak_alloc::PeakAlloc;
use rayon::ThreadPoolBuilder;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Peak bytes allocated during `f`, beyond those allocated before.
fn peak<T>(f: impl FnOnce() -> Result<T>) -> Result<(T, usize)> {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = f()?;
    Ok((result, ALLOCATOR.peak_usage() - before))
}

/// A single test, because the allocator counts for the whole process.
#[test]
fn peak_memory_is_bounded() -> Result<()> {
    let pool = |num_threads| {
        ThreadPoolBuilder::new().num_threads(num_threads).build().expect("a thread pool")
    };
    // Each thread has a buffer, so their number is the same on every machine.
    pool(2).install(forward_and_backward_allocate_no_copy_of_the_logits)?;
    // On a single thread, the warm-up runs on the thread that is measured.
    pool(1).install(|| {
        forward_linear_allocates_one_tile_of_logits()?;
        forward_linear_keeps_logits_within_its_budget()
    })
}

fn forward_and_backward_allocate_no_copy_of_the_logits() -> Result<()> {
    const ROWS: usize = 32;
    const CLASSES: usize = 16_384;
    // A row needs a label and its saved state, and the thread pool needs some blocks.
    const SMALL: usize = ROWS * 256 + 256 * 1024;

    let base = random(&[ROWS, CLASSES], 3., 1)?;
    let labels = random_labels(&[ROWS], CLASSES, 2)?;
    let probabilities = random_probabilities(&[ROWS, CLASSES], 1, 3)?.to_dtype(DType::F16)?;
    // The first use of the thread pool allocates.
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

                // candle allocates a tensor of zeros for each gradient, the gradient, and their
                // sum. A transposed view adds its gradient once more.
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

/// Peak bytes of `forward_linear` and of its backward.
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

fn forward_linear_allocates_one_tile_of_logits() -> Result<()> {
    let weight = Var::from_tensor(&random(&[1000, 4], 1., 1)?.to_dtype(DType::F32)?)?;
    let (classes, size) = weight.dims2()?;
    // A thread allocates a block as large as its cache in its first matrix multiplication. This
    // call does so with the rows of one tile.
    peaks(&weight, TILE.rows)?;
    for rows in [512, 4096, 16_384] {
        let (forward, backward) = peaks(&weight, rows)?;
        // The logits of a tile, and the copies that the multiplications pack.
        let tiles = 3 * TILE.rows * TILE.classes * size_of::<f32>();
        // A row needs a softmax state, twice during a merge, a label, a loss and its saved state.
        let bound = tiles + 104 * rows;
        assert!(forward < bound, "{rows} rows, forward: {forward} bytes of {bound}");
        // All logits together exceed the bound.
        assert!(bound < rows * classes * size_of::<f32>());
        // Backward first holds the gradients and a tile, then the tensors that candle adds to
        // zeros.
        let gradients = (rows + classes) * size * size_of::<f32>();
        let bound = (gradients + tiles).max(3 * gradients) + 128 * 1024;
        assert!(backward < bound, "{rows} rows, backward: {backward} bytes of {bound}");
    }

    let (rows, size) = (2048, 256);
    let weight = random(&[300, size], 1., 1)?.to_dtype(DType::BF16)?;
    peaks(&weight, TILE.rows)?;
    let (_, backward) = peaks(&weight, rows)?;
    // Half types first need gradient sums in f32, a tile's logits, weight and rows, the product
    // that is added to the sums, and blocks of the multiplication. Then they need the gradient,
    // candle's zeros, and the sum of both.
    let piece = TILE.rows * size * size_of::<f32>();
    let (sums, gradient) = (4 * rows * size, 2 * rows * size);
    let bound = (sums + 5 * piece).max(3 * gradient + piece) + 256 * 1024;
    assert!(backward < bound, "bf16: {backward} bytes of {bound}");
    Ok(())
}

/// Forward keeps the logits of as many rows as fit. Backward turns them into their gradient where they are.
fn forward_linear_keeps_logits_within_its_budget() -> Result<()> {
    const ROWS: usize = 1024;
    let weight = Var::from_tensor(&random(&[1000, 4], 1., 1)?.to_dtype(DType::F32)?)?;
    let (classes, size) = weight.dims2()?;
    let hidden = Var::from_tensor(&random(&[ROWS, size], 1., 2)?.to_dtype(DType::F32)?)?;
    let labels = random_labels(&[ROWS], classes, 3)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let row_bytes = classes * size_of::<f32>();
    let tiles = 3 * TILE.rows * TILE.classes * size_of::<f32>() + 128 * 1024;
    let bias = random(&[classes], 1., 4)?.to_dtype(DType::F32)?;
    for (kept_rows, bias) in [(63, None), (64, None), (700, Some(&bias)), (2 * ROWS, Some(&bias))] {
        let budget = kept_rows * row_bytes;
        let before = ALLOCATOR.current_usage();
        let (result, forward) = peak(|| {
            Ok(testing::forward_linear_tiled_within_budget(
                &loss, &hidden, &weight, bias, &labels, TILE, budget,
            )?)
        })?;
        let kept = ALLOCATOR.current_usage() - before;
        // With fewer than 64 rows a multiplication would not be worth its while.
        let expected = if kept_rows < 64 { 0 } else { kept_rows.min(ROWS) * row_bytes };
        let rows = 104 * ROWS;
        assert!(kept >= expected && kept < expected + rows, "{kept_rows} rows: {kept} bytes kept");
        assert!(forward < expected + tiles + rows, "{kept_rows} rows, forward: {forward} bytes");
        let (gradients, backward) = peak(|| result.backward())?;
        let grads = 3 * (ROWS + classes) * size * size_of::<f32>();
        assert!(backward < tiles + grads + rows, "{kept_rows} rows, backward: {backward} bytes");
        // The result still has its graph, but no logits.
        let left = ALLOCATOR.current_usage() - before;
        assert!(left < grads + rows, "{kept_rows} rows: {left} bytes left after backward");
        drop((result, gradients));
    }
    for (budget, expected) in [(usize::MAX, ROWS * row_bytes), (0, 0)] {
        let loss = loss.clone().with_logits_budget(budget);
        let before = ALLOCATOR.current_usage();
        let result = loss.forward_linear(&hidden, &weight, None, &labels)?;
        let kept = ALLOCATOR.current_usage() - before;
        assert!(kept >= expected && kept < expected + 104 * ROWS, "{budget}: {kept} bytes kept");
        drop(result);
    }
    // Probabilities are read where they are, or a tile at a time.
    let probabilities = random_probabilities(&[classes, ROWS], 0, 5)?.to_dtype(DType::F32)?;
    let all_equal = probabilities.narrow(1, 0, 1)?.t()?.broadcast_as((ROWS, classes))?;
    let mask: Vec<u8> = (0..ROWS).map(|row| u8::from(row % 10 != 0)).collect();
    let masked = loss.weigh_rows(&Tensor::new(mask, hidden.device())?)?;
    for (loss, targets) in [
        (&loss, &probabilities.t()?.contiguous()?),
        (&loss, &probabilities.t()?),
        (&loss, &all_equal),
        (&masked, &probabilities.t()?),
    ] {
        let (result, forward) = peak(|| {
            Ok(testing::forward_linear_tiled(loss, &hidden, &weight, None, targets, TILE)?)
        })?;
        let (_, backward) = peak(|| result.backward())?;
        let bound = tiles + 104 * ROWS + 4 * (ROWS + classes) * size * size_of::<f32>();
        assert!(forward.max(backward) < bound, "{forward} and {backward} bytes of {bound}");
    }
    // Nothing is kept if there is no gradient to compute.
    let before = ALLOCATOR.current_usage();
    let result = loss.forward_linear(&hidden.detach(), &weight.detach(), None, &labels)?;
    assert!(ALLOCATOR.current_usage() - before < 1024, "{result}");
    Ok(())
}
