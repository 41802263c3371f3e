//! The kernels on a GPU beside a copy of the same bytes from device to device, in the same run.
//!
//! `cargo bench --features cuda --bench gpu` (or `metal`) prints a table; `-- 4096` the lines that have that in
//! their name. Sets are of 256 MiB at least, since smaller ones would measure the cache, but for two small
//! shapes that show what launching costs. Each figure is the median of several spans, and each span ends
//! with a wait for the device.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing, testing};
use std::time::Instant;

const CLASSES: [usize; 7] = [256, 1024, 4096, 16_384, 65_536, 128_256, 262_144];
const SMALL: [(usize, usize); 2] = [(32, 3), (128, 10)];
const BYTES: usize = 256 << 20;

const SPANS: usize = 15;
/// Seconds that a span should last, at least.
const SPAN: f64 = 0.02;

fn main() -> Result<()> {
    let device = if cfg!(feature = "metal") { Device::new_metal(0) } else { Device::new_cuda(0) };
    let device = match device {
        Ok(device) => device,
        Err(error) => {
            println!("skipped, as there is no GPU: {error}");
            return Ok(());
        }
    };
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    println!(
        "| | copy, GB/s | forward, µs | to copy | backward, µs | to copy | both, µs | a step through autograd, µs |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    );
    for dtype in [DType::BF16, DType::F32] {
        let rows = |classes: usize| BYTES.div_ceil(classes * dtype.size_in_bytes());
        let large = CLASSES.into_iter().map(|classes| (rows(classes), classes));
        for (num_rows, num_classes) in SMALL.into_iter().chain(large) {
            let name = format!("{num_rows}x{num_classes} {}", dtype.as_str());
            if filter.as_ref().is_none_or(|filter| name.contains(filter)) {
                line(&name, &device, dtype, num_rows, num_classes)?;
            }
        }
    }
    Ok(())
}

fn line(
    name: &str,
    device: &Device,
    dtype: DType,
    num_rows: usize,
    num_classes: usize,
) -> Result<()> {
    let logits = Tensor::randn(0f32, 3., (num_rows, num_classes), device)?.to_dtype(dtype)?;
    let logits = Var::from_tensor(&logits)?;
    let labels = (0..num_rows).map(|row| (row * 7919 % num_classes) as u32).collect();
    let labels = Tensor::from_vec(labels, num_rows, device)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let upstream = Tensor::ones(num_rows, DType::F32, device)?;
    let (_, Some(saved)) = testing::forward_rows(&loss, &logits, &labels)? else {
        candle_core::bail!("nothing was saved for backward")
    };

    let copy = seconds(device, || logits.copy())?;
    let forward = seconds(device, || Ok(testing::forward_rows(&loss, &logits, &labels)?))?;
    let backward = seconds(device, || Ok(testing::backward_rows(&saved, &logits, &upstream)?))?;
    let both = seconds(device, || match testing::forward_rows(&loss, &logits, &labels)? {
        (_, Some(saved)) => Ok(Some(testing::backward_rows(&saved, &logits, &upstream)?)),
        (_, None) => Ok(None),
    })?;
    let step = seconds(device, || loss.forward(&logits, &labels)?.backward())?;

    // Forward reads the logits, backward reads them and writes as much, as a copy does.
    let bytes = (num_rows * num_classes * dtype.size_in_bytes()) as f64;
    let bandwidth = 2. * bytes / copy;
    println!(
        "| {name} | {:.0} | {:.1} | {:.2} | {:.1} | {:.2} | {:.1} | {:.1} |",
        bandwidth / 1e9,
        forward * 1e6,
        bytes / forward / bandwidth,
        backward * 1e6,
        2. * bytes / backward / bandwidth,
        both * 1e6,
        step * 1e6,
    );
    Ok(())
}

/// The median over the spans of the time that one call takes.
fn seconds<T>(device: &Device, mut f: impl FnMut() -> Result<T>) -> Result<f64> {
    let mut span = |calls: usize| -> Result<f64> {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..calls {
            f()?;
        }
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    };
    // Compiles what has to be, then finds out how many calls make a span.
    span(3)?;
    let calls = (SPAN / (span(3)? / 3.)).ceil().clamp(3., 1e4) as usize;
    let mut spans = (0..SPANS).map(|_| span(calls)).collect::<Result<Vec<f64>>>()?;
    spans.sort_by(f64::total_cmp);
    Ok(spans[SPANS / 2] / calls as f64)
}
