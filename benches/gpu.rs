//! Times the kernels on a GPU and compares them with a copy of the logits on the device.
//!
//! `cargo bench --features cuda --bench gpu` (or `metal`) prints a table. With `-- 4096`, it prints the lines whose
//! name contains 4096.
//!
//! Most logits have 256 MiB or more, so that they do not fit into the GPU's cache. Two small shapes show the cost of a
//! launch. Each time is the median over several samples. A sample times many calls and ends by synchronizing the device.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing, testing};
use std::time::Instant;

const CLASSES: [usize; 7] = [256, 1024, 4096, 16_384, 65_536, 128_256, 262_144];
const SMALL: [(usize, usize); 2] = [(32, 3), (128, 10)];
/// The least size of the logits, but for the small shapes.
const MIN_BYTES: usize = 256 << 20;

const SAMPLES: usize = 15;
/// The duration that a sample aims at.
const SAMPLE_SECONDS: f64 = 0.02;

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
        let rows = |classes: usize| MIN_BYTES.div_ceil(classes * dtype.size_in_bytes());
        let large = CLASSES.into_iter().map(|classes| (rows(classes), classes));
        for (num_rows, num_classes) in SMALL.into_iter().chain(large) {
            let name = format!("{num_rows}x{num_classes} {}", dtype.as_str());
            if filter.as_ref().is_none_or(|filter| name.contains(filter)) {
                print_line(&name, &device, dtype, num_rows, num_classes)?;
            }
        }
    }
    Ok(())
}

fn print_line(
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
    let grad_output = Tensor::ones(num_rows, DType::F32, device)?;
    let (_, Some(saved)) = testing::forward_rows(&loss, &logits, &labels)? else {
        candle_core::bail!("nothing was saved for backward")
    };

    let copy = seconds(device, || logits.copy())?;
    let forward = seconds(device, || Ok(testing::forward_rows(&loss, &logits, &labels)?))?;
    let backward = seconds(device, || Ok(testing::backward_rows(&saved, &logits, &grad_output)?))?;
    let both = seconds(device, || match testing::forward_rows(&loss, &logits, &labels)? {
        (_, Some(saved)) => Ok(Some(testing::backward_rows(&saved, &logits, &grad_output)?)),
        (_, None) => Ok(None),
    })?;
    let step = seconds(device, || loss.forward(&logits, &labels)?.backward())?;

    // Backward moves as many bytes as the copy: it reads the logits and writes the gradient. Forward moves half of them.
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

/// The median time of one call.
fn seconds<T>(device: &Device, mut f: impl FnMut() -> Result<T>) -> Result<f64> {
    let mut sample = |calls: usize| -> Result<f64> {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..calls {
            f()?;
        }
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    };
    // The first calls compile the kernels; the next ones set how many calls a sample has.
    sample(3)?;
    let calls = (SAMPLE_SECONDS / (sample(3)? / 3.)).ceil().clamp(3., 1e4) as usize;
    let mut samples = (0..SAMPLES).map(|_| sample(calls)).collect::<Result<Vec<f64>>>()?;
    samples.sort_by(f64::total_cmp);
    Ok(samples[SAMPLES / 2] / calls as f64)
}
