//! The loss straight from the hidden states beside a multiplication and the loss of all logits: time, what it is
//! spent on, and memory, on the CPU.
//!
//! `cargo bench --bench linear`. Memory is that of a process of its own for each way: what it holds at most beyond
//! what it held before (Linux). Unlike the other benchmarks this one has the system's allocator, which most programs
//! have. glibc's can be told to keep what is freed, by `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000`.

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
/// The classes of a tile of 4096 rows.
const TILE: usize = 1024;

struct Head {
    loss: LabelSmoothingLoss,
    hidden: Var,
    weight: Var,
    targets: Tensor,
}

impl Head {
    fn new([rows, size, classes]: [usize; 3], dtype: DType) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(0);
        let mut random = |dims: (usize, usize)| {
            let bound = 3f32 / (size as f32).sqrt();
            let numbers = (0..dims.0 * dims.1).map(|_| rng.random_range(-bound..bound)).collect();
            let tensor = Tensor::from_vec::<_, f32>(numbers, dims, &Device::Cpu)?;
            Var::from_tensor(&tensor.to_dtype(dtype)?)
        };
        let (hidden, weight) = (random((rows, size))?, random((classes, size))?);
        let targets: Vec<u32> = (0..rows).map(|_| rng.random_range(0..classes as u32)).collect();
        Ok(Self {
            loss: LabelSmoothingLoss::new(Smoothing::over_all(0.1)?),
            hidden,
            weight,
            targets: Tensor::from_vec(targets, rows, &Device::Cpu)?,
        })
    }

    fn of_logits(&self) -> Result<Tensor> {
        let logits = self.hidden.matmul(&self.weight.t()?)?;
        Ok(self.loss.forward(&logits, &self.targets)?)
    }

    fn linear(&self) -> Result<Tensor> {
        Ok(self.loss.forward_linear(&self.hidden, &self.weight, None, &self.targets)?)
    }

    /// The four multiplications alone, by as many classes at a time as the loss takes.
    fn multiplications(&self) -> Result<()> {
        let (hidden, weight) = (self.hidden.as_detached_tensor(), self.weight.as_detached_tensor());
        let classes = weight.dim(0)?;
        for first in (0..classes).step_by(TILE) {
            let weight = weight.narrow(0, first, TILE.min(classes - first))?;
            let logits = hidden.matmul(&weight.t()?)?;
            drop(logits);
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
            group.bench_function("forward: logits first", |b| b.iter(|| head.of_logits().unwrap()));
            group.bench_function("forward: linear", |b| b.iter(|| head.linear().unwrap()));
            group.bench_function("with backward: logits first", |b| {
                b.iter(|| head.of_logits().unwrap().backward().unwrap())
            });
            group.bench_function("with backward: linear", |b| {
                b.iter(|| head.linear().unwrap().backward().unwrap())
            });
            if dtype == DType::F32 && shape[0] == 4096 {
                group.bench_function("multiplications alone", |b| {
                    b.iter(|| head.multiplications().unwrap())
                });
                let logits =
                    head.hidden.matmul(&head.weight.narrow(0, 0, TILE).unwrap().t().unwrap());
                let (logits, upstream) = (logits.unwrap().detach(), head.targets.to_dtype(dtype));
                let (targets, upstream) = (head.targets.zeros_like().unwrap(), upstream.unwrap());
                let tiles = shape[2].div_ceil(TILE);
                group.bench_function("kernels alone", |b| {
                    b.iter(|| {
                        for _ in 0..tiles {
                            let (_, saved) =
                                testing::forward_rows(&head.loss, &logits, &targets).unwrap();
                            testing::backward_rows(&saved.unwrap(), &logits, &upstream).unwrap();
                        }
                    })
                });
            }
            group.finish();
        }
    }
}

/// A line of `/proc/self/status`, in bytes.
fn status(key: &str) -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<usize>().ok()? * 1024)
}

const WAY: &str = "LINEAR_BENCH_WAY";

/// What one step of a way holds at most, beyond what there was before.
fn peak(way: &str) -> Option<usize> {
    let head = Head::new(SHAPES[0], DType::F32).ok()?;
    // The peak counts from here.
    fs::write("/proc/self/clear_refs", "5").ok()?;
    let before = status("VmRSS:")?;
    let loss = if way == "linear" { head.linear() } else { head.of_logits() };
    let gradients = loss.ok()?.backward().ok()?;
    gradients.get(&head.weight)?;
    Some(status("VmHWM:")? - before)
}

fn main() {
    if let Ok(way) = env::var(WAY) {
        println!("{}", peak(&way).expect("Linux's /proc"));
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    bench(&mut criterion);
    criterion.final_summary();
    if env::args().any(|argument| argument == "--test") {
        return;
    }
    for way in ["logits first", "linear"] {
        let this = env::current_exe().expect("this program");
        let output = Command::new(this).env(WAY, way).output().expect("a process");
        let bytes = String::from_utf8_lossy(&output.stdout);
        match bytes.trim().parse::<f64>() {
            Ok(bytes) => println!("{:?}, {way}: {:.0} MB at most", SHAPES[0], bytes / 1e6),
            Err(_) => println!("memory is measured on Linux only"),
        }
    }
}
