//! Time and memory of `forward_linear` on the CPU, compared with a matmul followed by `forward`.
//!
//! `cargo bench --bench linear` runs it. Two more benchmarks time the parts of `forward_linear`: its multiplications
//! and its kernels.
//!
//! Peak memory is measured in a process for each method, on Linux only, and excludes the memory of the inputs.
//!
//! Unlike the other benchmarks, this one uses the system's allocator, as most programs do. With
//! `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000`, glibc keeps freed memory instead of returning it to the
//! system.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing, testing};
use criterion::Criterion;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::process::Command;
use std::time::Duration;
use std::{env, fs};

/// Rows, hidden size, classes.
const SHAPES: [[usize; 3]; 3] = [[4096, 256, 32_000], [1024, 1024, 32_000], [64, 64, 100]];
/// The classes of a tile that `forward_linear` chooses for 4096 rows.
const TILE_CLASSES: usize = 1024;

struct Head {
    loss: LabelSmoothingLoss,
    hidden: Var,
    weight: Var,
    targets: Tensor,
}

impl Head {
    fn new([rows, hidden_size, classes]: [usize; 3], dtype: DType) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(0);
        let mut random = |dims: (usize, usize)| {
            let bound = 3f32 / (hidden_size as f32).sqrt();
            let values = (0..dims.0 * dims.1).map(|_| rng.random_range(-bound..bound)).collect();
            let tensor = Tensor::from_vec::<_, f32>(values, dims, &Device::Cpu)?;
            Var::from_tensor(&tensor.to_dtype(dtype)?)
        };
        let (hidden, weight) = (random((rows, hidden_size))?, random((classes, hidden_size))?);
        let targets: Vec<u32> = (0..rows).map(|_| rng.random_range(0..classes as u32)).collect();
        Ok(Self {
            loss: LabelSmoothingLoss::new(Smoothing::over_all(0.1)?),
            hidden,
            weight,
            targets: Tensor::from_vec(targets, rows, &Device::Cpu)?,
        })
    }

    fn forward(&self) -> Result<Tensor> {
        let logits = self.hidden.matmul(&self.weight.t()?)?;
        Ok(self.loss.forward(&logits, &self.targets)?)
    }

    fn forward_linear(&self) -> Result<Tensor> {
        Ok(self.loss.forward_linear(&self.hidden, &self.weight, None, &self.targets)?)
    }

    /// The four multiplications of `forward_linear` and its backward, in the same tiles.
    fn multiplications(&self) -> Result<()> {
        let (hidden, weight) = (self.hidden.as_detached_tensor(), self.weight.as_detached_tensor());
        let classes = weight.dim(0)?;
        for first in (0..classes).step_by(TILE_CLASSES) {
            let weight = weight.narrow(0, first, TILE_CLASSES.min(classes - first))?;
            let logits = hidden.matmul(&weight.t()?)?;
            drop(logits);
            // Backward computes the logits again.
            let logits = hidden.matmul(&weight.t()?)?;
            logits.matmul(&weight)?;
            logits.t()?.matmul(&hidden)?;
        }
        Ok(())
    }
}

fn bench(criterion: &mut Criterion) {
    for shape in SHAPES {
        for dtype in [DType::F32, DType::BF16] {
            let head = Head::new(shape, dtype).expect("a head");
            let name = shape.map(|len| len.to_string()).join("x");
            let mut group = criterion.benchmark_group(format!("linear {name} {}", dtype.as_str()));
            group.sample_size(10).warm_up_time(Duration::from_millis(300));
            group.measurement_time(Duration::from_secs(2));
            group.bench_function("forward: logits first", |b| b.iter(|| head.forward().unwrap()));
            group.bench_function("forward: linear", |b| b.iter(|| head.forward_linear().unwrap()));
            group.bench_function("with backward: logits first", |b| {
                b.iter(|| head.forward().unwrap().backward().unwrap())
            });
            group.bench_function("with backward: linear", |b| {
                b.iter(|| head.forward_linear().unwrap().backward().unwrap())
            });
            if dtype == DType::F32 && shape[0] == 4096 {
                group.bench_function("multiplications alone", |b| {
                    b.iter(|| head.multiplications().unwrap())
                });
                let logits = head
                    .hidden
                    .matmul(&head.weight.narrow(0, 0, TILE_CLASSES).unwrap().t().unwrap());
                let logits = logits.unwrap().detach();
                let grad_output = head.targets.to_dtype(dtype).unwrap();
                let targets = head.targets.zeros_like().unwrap();
                let tiles = shape[2].div_ceil(TILE_CLASSES);
                group.bench_function("kernels alone", |b| {
                    b.iter(|| {
                        for _ in 0..tiles {
                            let (_, saved) =
                                testing::forward_rows(&head.loss, &logits, &targets).unwrap();
                            testing::backward_rows(&saved.unwrap(), &logits, &grad_output).unwrap();
                        }
                    })
                });
            }
            group.finish();
        }
    }
}

/// A value of `/proc/self/status`, in bytes.
fn status(key: &str) -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<usize>().ok()? * 1024)
}

/// The environment variable that tells a child process which method to measure.
const METHOD_VARIABLE: &str = "LINEAR_BENCH_WAY";

/// The peak memory of one forward and backward pass, without the memory of the inputs.
fn peak_bytes(method: &str) -> Option<usize> {
    let head = Head::new(SHAPES[0], DType::F32).ok()?;
    // Resets the peak, `VmHWM`.
    fs::write("/proc/self/clear_refs", "5").ok()?;
    let before = status("VmRSS:")?;
    let loss = if method == "linear" { head.forward_linear() } else { head.forward() };
    let gradients = loss.ok()?.backward().ok()?;
    gradients.get(&head.weight)?;
    Some(status("VmHWM:")? - before)
}

fn main() {
    if let Ok(method) = env::var(METHOD_VARIABLE) {
        println!("{}", peak_bytes(&method).expect("Linux's /proc"));
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    bench(&mut criterion);
    criterion.final_summary();
    if env::args().any(|argument| argument == "--test") {
        return;
    }
    for method in ["logits first", "linear"] {
        let program = env::current_exe().expect("the path of this program");
        let output =
            Command::new(program).env(METHOD_VARIABLE, method).output().expect("a child process");
        let bytes = String::from_utf8_lossy(&output.stdout);
        match bytes.trim().parse::<f64>() {
            Ok(bytes) => println!("{:?}, {method}: {:.0} MB at most", SHAPES[0], bytes / 1e6),
            Err(_) => println!("memory is measured on Linux only"),
        }
    }
}
