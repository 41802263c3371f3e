//! Times the loss on a GPU and compares it with a copy of the logits on the device.
//!
//! `cargo bench --features cuda --bench gpu` (or `metal`) prints two tables: the loss of logits, and that of hidden states.
//! With `-- x4096`, it prints the lines whose name contains x4096; several such arguments choose more lines.
//!
//! - Forward is `LabelSmoothingLoss::forward` of tracked logits, with the mean. Backward is its kernel alone, with the
//!   gradient that the mean passes on. A step is both through candle's autograd, which adds the gradient to zeros.
//! - GB/s count the logits alone: once in forward, twice in backward and in the copy. "To copy" divides by the copy's.
//! - The calls take several sets of inputs in turn, so that none finds its logits in the GPU's cache. Each result stays
//!   in memory until its set's next turn. Only the two small shapes fit into the cache. They show the cost of a launch.
//! - A time is the median over samples of many calls. On CUDA it is the time between two events on the device's
//!   stream. Copies, forwards and backwards are queued while the device is busy with other work, so that their times
//!   are the device's. Steps are not: the host limits those of small shapes. On Metal, every time is the host's, to
//!   the end of the wait for the device.
//! - On CUDA the memory pool keeps freed memory, so that no time contains an allocation from the driver.
//! - The second table begins with hidden states. "Logits first" is a matmul and `forward`. The multiplications are the three
//!   of whole matrices that a step needs. Its calls are not queued ahead, and take one set of inputs. Memory is the peak of a
//!   step beyond the inputs and the gradients of hidden states and weight.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Smoothing, testing};
use timing::Timer;

const SMALL: [(usize, usize); 2] = [(32, 3), (128, 10)];
const CLASSES: [usize; 7] = [256, 1024, 4096, 16_384, 65_536, 128_256, 262_144];
/// The least size of the logits with these classes.
const MIN_BYTES: usize = 1 << 30;

/// QuACK's shapes, with the GB/s of its forward in bf16 on an H100 (HBM3, 3350 GB/s). They are the points of a curve in
/// Dao-AILab/quack, `media/bf16_kernel_benchmarks_single_row.svg`, of July 2025. That forward has no reduction and no
/// smoothing. Each call was timed alone, so that the cost of a launch counts. Its bytes include 4 a row.
const QUACK: [(usize, usize, usize); 7] = [
    (32_768, 256, 1113),
    (32_768, 1024, 1902),
    (32_768, 4096, 2692),
    (32_768, 16_384, 3061),
    (32_768, 65_536, 3182),
    (16_384, 131_072, 3163),
    (8192, 262_144, 3034),
];

/// Rows, hidden size, classes.
const HEADS: [[usize; 3]; 2] = [[8192, 4096, 32_000], [8192, 4096, 151_936]];

/// The least size of all sets of inputs: several times the cache of a GPU.
const MIN_BYTES_OF_SETS: usize = 512 << 20;
const MAX_SETS: usize = 32;

const GIB: f64 = (1 << 30) as f64;
const SAMPLES: usize = 15;
/// The duration that a sample aims at.
const SAMPLE_SECONDS: f64 = 0.02;
const MAX_CALLS: usize = 10_000;

fn main() -> Result<()> {
    let device = if cfg!(feature = "metal") { Device::new_metal(0) } else { Device::new_cuda(0) };
    let device = match device {
        Ok(device) => device,
        Err(error) => {
            println!("skipped, as there is no GPU: {error}");
            return Ok(());
        }
    };
    let filters: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_wanted = |name: &str| {
        filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
    };
    println!(
        "{}\n\n\
         | | copy, GB/s | forward, µs | GB/s | to copy | QuACK's forward, GB/s | backward, µs | GB/s | to copy | a step, µs |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        timing::describe(&device)?
    );
    for case in cases() {
        if is_wanted(&case.name()) {
            print_line(&case, &device)?;
        }
    }
    println!(
        "\n| from hidden states, bf16 | the multiplications, ms | | forward, ms | step, ms | memory, GiB |\n\
         | --- | ---: | --- | ---: | ---: | ---: |"
    );
    for [rows, hidden_size, classes] in HEADS {
        let name = format!("{rows}x{hidden_size}x{classes} bf16");
        if is_wanted(&name) {
            print_head(&name, [rows, hidden_size, classes], &device)?;
        }
    }
    Ok(())
}

#[derive(PartialEq)]
struct Case {
    num_rows: usize,
    num_classes: usize,
    dtype: DType,
}

impl Case {
    fn name(&self) -> String {
        format!("{}x{} {}", self.num_rows, self.num_classes, self.dtype.as_str())
    }

    fn num_bytes(&self) -> usize {
        self.num_rows * self.num_classes * self.dtype.size_in_bytes()
    }

    /// What QuACK published for this case.
    fn quack(&self) -> Option<usize> {
        let shape = (self.num_rows, self.num_classes);
        let published = QUACK.iter().find(|&&(rows, classes, _)| (rows, classes) == shape)?;
        (self.dtype == DType::BF16).then_some(published.2)
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [DType::BF16, DType::F32] {
        let rows = |num_classes: usize| MIN_BYTES.div_ceil(num_classes * dtype.size_in_bytes());
        let large = CLASSES.map(|num_classes| (rows(num_classes), num_classes));
        for (num_rows, num_classes) in SMALL.into_iter().chain(large) {
            cases.push(Case { num_rows, num_classes, dtype });
        }
    }
    for (num_rows, num_classes, _) in QUACK {
        let case = Case { num_rows, num_classes, dtype: DType::BF16 };
        if !cases.contains(&case) {
            cases.push(case);
        }
    }
    cases
}

fn print_line(case: &Case, device: &Device) -> Result<()> {
    let timer = &mut Timer::new(device)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let num_sets = MIN_BYTES_OF_SETS.div_ceil(case.num_bytes()).clamp(2, MAX_SETS);
    let sets = (0..num_sets)
        .map(|_| InputSet::new(case, &loss, device))
        .collect::<Result<Vec<InputSet>>>()?;
    let mean = (Tensor::ones((), DType::F32, device)? / case.num_rows as f64)?;
    let grad_output = mean.broadcast_as(case.num_rows)?;

    let copy = seconds(timer, Queued::Ahead, &sets, |set| set.logits.copy())?;
    let forward =
        seconds(timer, Queued::Ahead, &sets, |set| Ok(loss.forward(&set.logits, &set.labels)?))?;
    let backward = seconds(timer, Queued::Ahead, &sets, |set| {
        Ok(testing::backward_rows(&set.saved, &set.logits, &grad_output)?)
    })?;
    let step = seconds(timer, Queued::InTime, &sets, |set| {
        loss.forward(&set.logits, &set.labels)?.backward()
    })?;

    let gigabytes = case.num_bytes() as f64 / 1e9;
    let copy = 2. * gigabytes / copy;
    let kernel = |gigabytes: f64, seconds: f64| {
        let bandwidth = gigabytes / seconds;
        format!("{:.1} | {bandwidth:.0} | {:.2}", seconds * 1e6, bandwidth / copy)
    };
    println!(
        "| {} | {copy:.0} | {} | {} | {} | {:.1} |",
        case.name(),
        kernel(gigabytes, forward),
        case.quack().map_or(String::new(), |published| published.to_string()),
        kernel(2. * gigabytes, backward),
        step * 1e6,
    );
    Ok(())
}

/// The inputs of a call, in memory of their own.
struct InputSet {
    logits: Var,
    labels: Tensor,
    saved: testing::Saved,
}

impl InputSet {
    fn new(case: &Case, loss: &LabelSmoothingLoss, device: &Device) -> Result<Self> {
        let &Case { num_rows, num_classes, dtype } = case;
        let logits = Tensor::randn(0f32, 3., (num_rows, num_classes), device)?.to_dtype(dtype)?;
        let logits = Var::from_tensor(&logits)?;
        let labels = labels(num_rows, num_classes, device)?;
        let (_, Some(saved)) = testing::forward_rows(loss, &logits, &labels)? else {
            candle_core::bail!("nothing was saved for backward")
        };
        Ok(Self { logits, labels, saved })
    }
}

fn labels(rows: usize, classes: usize, device: &Device) -> Result<Tensor> {
    let labels = (0..rows).map(|row| (row * 7919 % classes) as u32).collect();
    Tensor::from_vec(labels, rows, device)
}

/// A last layer without a bias, and the labels of its rows.
struct Head {
    hidden: Var,
    weight: Var,
    labels: Tensor,
}

impl Head {
    fn new([rows, hidden_size, classes]: [usize; 3], device: &Device) -> Result<Self> {
        let random = |dims: (usize, usize), std: f64| {
            let values = Tensor::randn(0f32, std as f32, dims, device)?;
            Var::from_tensor(&values.to_dtype(DType::BF16)?)
        };
        Ok(Self {
            hidden: random((rows, hidden_size), 1.)?,
            weight: random((classes, hidden_size), 3. / (hidden_size as f64).sqrt())?,
            labels: labels(rows, classes, device)?,
        })
    }

    fn forward(&self, loss: &LabelSmoothingLoss) -> Result<Tensor> {
        Ok(loss.forward(&self.hidden.matmul(&self.weight.t()?)?, &self.labels)?)
    }

    fn forward_linear(&self, loss: &LabelSmoothingLoss) -> Result<Tensor> {
        Ok(loss.forward_linear(&self.hidden, &self.weight, None, &self.labels)?)
    }

    fn multiplications(&self) -> Result<[Tensor; 3]> {
        let (hidden, weight) = (self.hidden.as_detached_tensor(), self.weight.as_detached_tensor());
        let logits = hidden.matmul(&weight.t()?)?;
        Ok([logits.matmul(&weight)?, logits.t()?.matmul(&hidden)?, logits])
    }
}

fn print_head(name: &str, shape: [usize; 3], device: &Device) -> Result<()> {
    let timer = &mut Timer::new(device)?;
    let head = [Head::new(shape, device)?];
    let multiplications = seconds(timer, Queued::InTime, &head, Head::multiplications)?;
    let mut first_cells = format!("{name} | {:.2}", multiplications * 1e3);
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let least_memory = loss.clone().with_logits_budget(0);
    type Method = fn(&Head, &LabelSmoothingLoss) -> Result<Tensor>;
    let methods: [(&str, Method, &LabelSmoothingLoss); 3] = [
        ("logits first", Head::forward, &loss),
        ("`forward_linear`", Head::forward_linear, &loss),
        ("with a budget of 0", Head::forward_linear, &least_memory),
    ];
    for (name, method, loss) in methods {
        let forward = seconds(timer, Queued::InTime, &head, |head| method(head, loss))?;
        let run_step = |head: &Head| method(head, loss)?.backward();
        let step = seconds(timer, Queued::InTime, &head, run_step)?;
        let memory = timer.peak_bytes(|| run_step(&head[0]))?;
        let [hidden, weight] = [&head[0].hidden, &head[0].weight].map(|var| var.elem_count() * 2);
        let memory = memory.map(|bytes| (bytes as f64 - (hidden + weight) as f64) / GIB);
        println!(
            "| {first_cells} | {name} | {:.2} | {:.2} | {} |",
            forward * 1e3,
            step * 1e3,
            memory.map_or(String::new(), |gib| format!("{gib:.2}")),
        );
        first_cells = " | ".to_string();
    }
    Ok(())
}

/// When the host queues the calls of a sample.
#[derive(Clone, Copy, PartialEq)]
enum Queued {
    /// Before the device reaches the first of them, if the timer supports it.
    Ahead,
    /// While the device works on them.
    InTime,
}

/// The median time of one call.
fn seconds<S, T>(
    timer: &mut Timer,
    queued: Queued,
    sets: &[S],
    call: impl Fn(&S) -> Result<T>,
) -> Result<f64> {
    let mut results = sets.iter().map(|_| None).collect::<Vec<Option<T>>>();
    let mut turns = sets.iter().enumerate().cycle();
    let mut queue = |calls: usize| {
        turns.by_ref().take(calls).try_for_each(|(index, set)| {
            results[index] = Some(call(set)?);
            Ok(())
        })
    };
    // The first calls compile the kernels and fill the memory pool. The next ones set how many calls a sample has.
    queue(2 * sets.len())?;
    let estimate = timer.seconds(Queued::InTime, 3, &mut queue)? / 3.;
    let max_calls = if queued == Queued::Ahead { timing::MAX_QUEUED } else { MAX_CALLS };
    let calls = ((SAMPLE_SECONDS / estimate) as usize).clamp(1, max_calls);
    let mut samples = (0..SAMPLES)
        .map(|_| timer.seconds(queued, calls, &mut queue))
        .collect::<Result<Vec<f64>>>()?;
    samples.sort_by(f64::total_cmp);
    Ok(samples[SAMPLES / 2] / calls as f64)
}

/// Timing by CUDA events.
#[cfg(feature = "cuda")]
mod timing {
    use super::Queued;
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute as Attribute;
    use candle_core::cuda_backend::cudarc::driver::{CudaStream, result, sys};
    use candle_core::{DType, Device, Result, Tensor};
    use std::sync::Arc;

    /// The most calls that are queued ahead. The host waits when about a thousand launches are in a stream.
    pub const MAX_QUEUED: usize = 64;

    const HEAD_START_BYTES: usize = 256 << 20;
    const MAX_COPIES: usize = 64;
    /// The calls after the copies that are not timed, so that those write back to memory what the copies left in the cache.
    const FIRST_CALLS: usize = 8;
    const TIMED: Option<sys::CUevent_flags> = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);

    pub fn describe(device: &Device) -> Result<String> {
        device.as_cuda_device()?.cuda_stream().context().name().w()
    }

    pub struct Timer {
        stream: Arc<CudaStream>,
        pool: sys::CUmemoryPool,
        /// Copied to keep the device busy while calls are queued ahead.
        head_start: Tensor,
        copies: usize,
    }

    impl Timer {
        /// The timer of a device. The device's memory pool gives back what is free now, and keeps what is freed from now
        /// on.
        pub fn new(device: &Device) -> Result<Self> {
            let stream = device.as_cuda_device()?.cuda_stream();
            stream.synchronize().w()?;
            // SAFETY: the context holds the device and with it the pool.
            let pool = unsafe {
                let pool =
                    result::device::get_default_mem_pool(stream.context().cu_device()).w()?;
                result::mem_pool::trim_to(pool, 0).w()?;
                pool
            };
            set_attribute(pool, Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)?;
            let head_start = Tensor::zeros(HEAD_START_BYTES, DType::U8, device)?;
            Ok(Self { stream, pool, head_start, copies: 1 })
        }

        /// The most bytes that a call has in use at a time, beyond those in use before.
        pub fn peak_bytes<T>(&self, call: impl FnOnce() -> Result<T>) -> Result<Option<u64>> {
            self.stream.synchronize().w()?;
            let before = get_attribute(self.pool, Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
            set_attribute(self.pool, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)?;
            let _result = call()?;
            self.stream.synchronize().w()?;
            let high = get_attribute(self.pool, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?;
            Ok(Some(high.saturating_sub(before)))
        }

        /// The time of so many calls.
        pub fn seconds(
            &mut self,
            queued: Queued,
            calls: usize,
            mut queue: impl FnMut(usize) -> Result<()>,
        ) -> Result<f64> {
            loop {
                if queued == Queued::Ahead {
                    (0..self.copies).try_for_each(|_| self.head_start.copy().map(drop))?;
                    queue(FIRST_CALLS)?;
                }
                let start = self.stream.record_event(TIMED).w()?;
                queue(calls)?;
                let is_late = queued == Queued::Ahead && start.try_is_complete().w()?;
                let end = self.stream.record_event(TIMED).w()?;
                let seconds = f64::from(start.elapsed_ms(&end).w()?) / 1e3;
                if !is_late {
                    return Ok(seconds);
                }
                if self.copies == MAX_COPIES {
                    eprintln!("The host, not the device, may limit the next line.");
                    return Ok(seconds);
                }
                self.copies *= 2;
            }
        }
    }

    /// An attribute of a device's memory pool, of those that are a u64.
    fn get_attribute(pool: sys::CUmemoryPool, attribute: Attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: the driver writes a u64.
        unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()) }.w()?;
        Ok(value)
    }

    fn set_attribute(pool: sys::CUmemoryPool, attribute: Attribute, mut value: u64) -> Result<()> {
        // SAFETY: the driver reads a u64.
        unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut value).cast()) }.w()
    }
}

/// Timing by the host's clock.
#[cfg(not(feature = "cuda"))]
mod timing {
    use super::Queued;
    use candle_core::{Device, Result};
    use std::time::Instant;

    pub const MAX_QUEUED: usize = super::MAX_CALLS;

    pub fn describe(device: &Device) -> Result<String> {
        Ok(format!("{:?}", device.location()))
    }

    pub struct Timer(Device);

    impl Timer {
        pub fn new(device: &Device) -> Result<Self> {
            Ok(Self(device.clone()))
        }

        /// Not known for this device.
        pub fn peak_bytes<T>(&self, _: impl FnOnce() -> Result<T>) -> Result<Option<u64>> {
            Ok(None)
        }

        /// The time of so many calls.
        pub fn seconds(
            &mut self,
            _: Queued,
            calls: usize,
            mut queue: impl FnMut(usize) -> Result<()>,
        ) -> Result<f64> {
            self.0.synchronize()?;
            let start = Instant::now();
            queue(calls)?;
            self.0.synchronize()?;
            Ok(start.elapsed().as_secs_f64())
        }
    }
}
