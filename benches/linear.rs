//! Time and memory of `forward_linear` on the CPU, compared with a matmul followed by `forward`.
//!
//! `cargo bench --bench linear` runs it. More benchmarks time the parts of `forward_linear`: its multiplications, its kernels, and
//! the sums of gradients with candle's zeros.
//!
//! Peak memory is measured in a process for each method, on Linux only, and excludes the memory of the inputs.
//!
//! Unlike the other benchmarks, this one uses the system's allocator, as most programs do. With
//! `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000`, glibc keeps freed memory instead of returning it to the
//! system. With `RUSTFLAGS="--cfg mimalloc"` the allocator is mimalloc.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing, testing};
use criterion::Criterion;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::process::Command;
use std::time::Duration;
use std::{env, fs};

#[cfg(mimalloc)]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Rows, hidden size, classes.
const SHAPES: [[usize; 3]; 3] = [[4096, 256, 32_000], [1024, 1024, 32_000], [64, 64, 100]];
const IGNORED: i64 = -100;

struct Head {
    loss: LabelSmoothingLoss,
    hidden: Var,
    weight: Var,
    targets: Tensor,
    /// The targets of a batch with ignored rows, half of them in runs of 64.
    half_ignored: Tensor,
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
        let targets: Vec<i64> = (0..rows).map(|_| rng.random_range(0..classes as i64)).collect();
        let ignore = |(row, &target)| if row / 64 % 2 == 0 { target } else { IGNORED };
        let half_ignored: Vec<i64> = targets.iter().enumerate().map(ignore).collect();
        Ok(Self {
            loss: LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_ignore_index(IGNORED),
            hidden,
            weight,
            targets: Tensor::from_vec(targets, rows, &Device::Cpu)?,
            half_ignored: Tensor::from_vec(half_ignored, rows, &Device::Cpu)?,
        })
    }

    fn forward(&self) -> Result<Tensor> {
        let logits = self.hidden.matmul(&self.weight.t()?)?;
        Ok(self.loss.forward(&logits, &self.targets)?)
    }

    fn forward_linear(&self, loss: &LabelSmoothingLoss, targets: &Tensor) -> Result<Tensor> {
        Ok(loss.forward_linear(&self.hidden, &self.weight, None, targets)?)
    }

    /// The multiplications of forward and backward on whole matrices, in f32.
    fn multiplications(&self) -> Result<()> {
        let (hidden, weight) = (self.hidden.as_detached_tensor(), self.weight.as_detached_tensor());
        let logits = hidden.matmul(&weight.t()?)?;
        logits.matmul(&weight)?;
        logits.t()?.matmul(&hidden)?;
        Ok(())
    }

    /// What candle does with the gradients of the operands: it adds each to zeros.
    fn add_to_zeros(&self) -> Result<()> {
        (self.hidden.zeros_like()? + self.hidden.as_tensor())?;
        (self.weight.zeros_like()? + self.weight.as_tensor())?;
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
            let no_budget = head.loss.clone().with_logits_budget(0);
            group.bench_function("forward: logits first", |b| b.iter(|| head.forward().unwrap()));
            group.bench_function("forward: linear", |b| {
                b.iter(|| head.forward_linear(&head.loss, &head.targets).unwrap())
            });
            group.bench_function("with backward: logits first", |b| {
                b.iter(|| head.forward().unwrap().backward().unwrap())
            });
            for (name, loss, targets) in [
                ("linear", &head.loss, &head.targets),
                ("linear, budget 0", &no_budget, &head.targets),
                ("linear, half of the rows ignored", &head.loss, &head.half_ignored),
            ] {
                group.bench_function(format!("with backward: {name}"), |b| {
                    b.iter(|| head.forward_linear(loss, targets).unwrap().backward().unwrap())
                });
            }
            if dtype == DType::F32 && shape[0] > 64 {
                group.bench_function("three multiplications", |b| {
                    b.iter(|| head.multiplications().unwrap())
                });
                group.bench_function("zeros and addition of the gradients", |b| {
                    b.iter(|| head.add_to_zeros().unwrap())
                });
                group.bench_function("kernels", |b| {
                    let logits = head.hidden.matmul(&head.weight.t().unwrap()).unwrap().detach();
                    let grad_output = head.targets.to_dtype(dtype).unwrap();
                    b.iter(|| {
                        let (_, saved) =
                            testing::forward_rows(&head.loss, &logits, &head.targets).unwrap();
                        testing::backward_rows(&saved.unwrap(), &logits, &grad_output).unwrap();
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
    let loss = match method {
        "logits first" => head.forward(),
        "linear" => head.forward_linear(&head.loss, &head.targets),
        _ => head.forward_linear(&head.loss.clone().with_logits_budget(0), &head.targets),
    };
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
    for method in ["logits first", "linear", "linear, budget 0"] {
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
