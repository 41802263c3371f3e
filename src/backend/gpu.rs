//! What the GPU backends share: which kernel runs, over how many threads, and with what numbers.
//!
//! A backend's source is compiled for one [`Kind`] of input at a time, and has the kernels
//!
//! ```text
//! forward    the losses, or what a range of the classes says of each row (its part)
//! finish     the losses from all parts of each row
//! reduce     the sum of the losses, divided
//! backward   the gradient of the logits
//! smooth     the coefficients of all classes themselves
//! ```
//!
//! Nothing here waits for the device: kernels are put into its queue, and no number comes back.

use super::{Coefficients, Forward, Operand, Problem, Reduce, Rows, check_layout};
use crate::error::{Error, Result};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{DType, Layout, Storage, StorageRef, Tensor, WithDType};
use std::fmt::Write;

/// A device's memory, and the way to run a kernel on it.
pub(crate) trait Gpu: BackendStorage<Device: BackendDevice<Storage = Self>> {
    /// What a launch of the kernel may have.
    fn limits(device: &Self::Device, kernel: Kernel) -> candle_core::Result<Limits>;

    /// How many elements there are.
    fn len(&self) -> usize;

    /// The storage, if it is of this backend.
    fn of(storage: &Storage) -> Option<&Self>;

    /// `len` elements of any value, at least one: devices allocate no empty memory.
    fn alloc(device: &Self::Device, len: usize, dtype: DType) -> candle_core::Result<Self> {
        // SAFETY: every bit pattern is a number, and the kernels write what is read afterwards.
        unsafe { device.alloc_uninit(&len.max(1).into(), dtype) }
    }

    /// Puts a kernel into the device's queue, for so many groups of so many threads.
    ///
    /// # Safety
    /// The kernel must take these buffers and then `params`, and its threads must stay inside each of
    /// them.
    unsafe fn launch<P: Copy>(
        device: &Self::Device,
        kernel: Kernel,
        size: (usize, usize),
        buffers: &mut [Buffer<Self>],
        params: &P,
    ) -> candle_core::Result<()>;
}

/// What a device can do at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Groups of threads of a launch, at most.
    pub groups: usize,
    /// Threads of a group, at most.
    pub threads: usize,
    /// Threads that exchange values directly: a warp, or a simdgroup. A power of two.
    pub warp: usize,
}

/// What a kernel gets for one of its pointers.
pub(crate) enum Buffer<'a, S> {
    In(&'a S),
    Out(&'a mut S),
    /// The kernel does not use it this time.
    Unused,
}

impl<'a, S> Buffer<'a, S> {
    fn maybe_in(storage: Option<&'a S>) -> Self {
        storage.map_or(Self::Unused, Self::In)
    }

    fn maybe_out(storage: &'a mut Option<S>) -> Self {
        storage.as_mut().map_or(Self::Unused, Self::Out)
    }
}

/// What the source is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kind {
    logits: DType,
    targets: DType,
    per_class: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kernel {
    pub name: &'static str,
    pub kind: Kind,
}

impl Kind {
    /// The definitions that stand before the source, which says what each is.
    pub fn definitions(self) -> Result<String> {
        let Self { logits, targets, per_class } = self;
        let real = if logits == DType::F64 { "f64" } else { "f32" };
        let mut text = String::new();
        for (name, value) in [
            ("LOGITS", type_name(logits)?),
            ("REAL", real),
            ("TARGETS", type_name(targets)?),
            ("CLASS_TARGETS", if targets.is_int() { "1" } else { "0" }),
            ("PER_CLASS", if per_class { "1" } else { "0" }),
        ] {
            writeln!(text, "#define {name} {value}").map_err(candle_core::Error::wrap)?;
        }
        Ok(text)
    }
}

/// A dtype as the kernels call it.
fn type_name(dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::U8 => "u8",
        DType::U32 => "u32",
        DType::I16 => "i16",
        DType::I32 => "i32",
        DType::I64 => "i64",
        DType::F8E4M3 => "f8",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::F32 => "f32",
        DType::F64 => "f64",
        dtype => {
            let expected = "a class index or a probability";
            return Err(Error::TargetsDType { dtype, expected });
        }
    })
}

// ---- What the kernels get, laid out as their source has it.

const DIMS: usize = 16;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct View {
    start: u64,
    class_stride: u64,
    rank: u64,
    lengths: [u64; DIMS],
    strides: [u64; DIMS],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Params<A> {
    logits: View,
    targets: View,
    upstream: View,
    num_rows: u64,
    num_classes: u64,
    first_class: u64,
    range: u64,
    positions: u64,
    segment: u64,
    segments: u64,
    num_parts: u64,
    first_part: u64,
    ignore_index: i64,
    ignores: u32,
    along_rows: u32,
    lanes: u32,
    wants_parts: u32,
    wants_weights: u32,
    wants_statistics: u32,
    scale: A,
    spread: A,
    own: A,
    weight: A,
    z_loss: A,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Reduction<A> {
    len: u64,
    piece: u64,
    weighted: u32,
    divides: u32,
    divisor: A,
    scale: A,
    unscale: A,
}

/// Numbers of a row's part: maximum, Σ exp, Σ r, and Σ r·(x − maximum).
const PART: usize = 4;

impl View {
    /// The rows of a tensor that are inside its storage; without a class dimension every element is a
    /// row of its own.
    fn new<S: Gpu>((storage, layout): Operand<S>, class_dim: Option<usize>) -> Result<Self> {
        check_layout(layout, storage.len())?;
        let stride = class_dim.and_then(|dim| layout.stride().get(dim));
        let mut view = Self {
            start: layout.start_offset() as u64,
            class_stride: stride.map_or(0, |&stride| stride as u64),
            ..Self::default()
        };
        let rows = Rows::new(layout, class_dim);
        let mut slots = view.lengths.iter_mut().zip(&mut view.strides);
        for dim in rows.dims() {
            let Some((len, stride)) = slots.next() else {
                return Err(Error::TooManyStrides {
                    shape: layout.dims().to_vec(),
                    stride: layout.stride().to_vec(),
                    most: DIMS,
                });
            };
            (*len, *stride) = (dim.len as u64, dim.stride as u64);
            view.rank += 1;
        }
        Ok(view)
    }

    /// Whether it is the rows of a class that lie next to each other, and not the classes of a row.
    fn is_along_rows(&self) -> bool {
        let inner = self.strides.get(self.rank.saturating_sub(1) as usize);
        self.class_stride != 1 && inner == Some(&1)
    }
}

// ---- How the work is shared

/// Threads of a group, at most: `THREADS` in the source.
const THREADS: usize = 256;
/// Bytes of the widest access.
const ACCESS: usize = 16;
/// Tasks that keep every processor of a large GPU busy. A forward kernel with more than one for each row
/// needs a second kernel to merge them, so there a row is split only for want of rows.
const TASKS_FORWARD: usize = 512;
const TASKS_BACKWARD: usize = 2048;
/// Values for each lane, at least, before more lanes share a row, and before a row is split.
const PACKS_PER_LANE: usize = 2;
const STRIDED_PER_LANE: usize = 8;
const PACKS_PER_TASK: usize = 4;
/// Values that one lane adds up one after the other, at most, for the sake of their digits.
const MOST_STRIDED_PER_LANE: usize = 512;
/// Rows that one group adds up.
const PIECE: usize = 4096;

impl Limits {
    /// Threads of a group, at most: a power of two, and so whole warps.
    fn most_threads(self) -> usize {
        1 << self.threads.clamp(self.warp, THREADS).ilog2()
    }
}

impl<A> Params<A> {
    /// Shares the rows between groups of threads, and gives back how many there are of either.
    fn share(
        &mut self,
        limits: Limits,
        logits: DType,
        along_rows: bool,
        tasks: usize,
    ) -> (usize, usize) {
        let most_threads = limits.most_threads();
        let (num_rows, range) = (self.num_rows as usize, self.range as usize);
        let (pack, lanes) = match along_rows {
            false => {
                let pack = ACCESS / logits.size_in_bytes();
                (pack, range.div_ceil(PACKS_PER_LANE * pack).min(most_threads))
            }
            // Fewer, so that a warp reads one stretch of a class.
            true => (1, range.div_ceil(STRIDED_PER_LANE).min(most_threads / limits.warp)),
        };
        let lanes = lanes.next_power_of_two();
        let threads = match num_rows.checked_next_power_of_two() {
            Some(rows) if rows < most_threads => (rows * lanes).clamp(limits.warp, most_threads),
            _ => most_threads,
        };
        let groups = num_rows.div_ceil(threads / lanes);
        let least = match along_rows {
            false => PACKS_PER_TASK * pack * lanes,
            true => PACKS_PER_TASK * STRIDED_PER_LANE * lanes,
        };
        let fewest = match along_rows {
            false => 1,
            true => range.div_ceil(MOST_STRIDED_PER_LANE * lanes).max(1),
        };
        let segments = tasks.div_ceil(groups.max(1)).min(range.div_ceil(least)).max(fewest);
        // Segments of whole packs.
        let segment = range.div_ceil(segments).next_multiple_of(pack * lanes).max(1);

        self.along_rows = along_rows.into();
        self.lanes = lanes as u32;
        self.segment = segment as u64;
        self.segments = range.div_ceil(segment).max(1) as u64;
        (groups.saturating_mul(self.segments as usize).min(limits.groups), threads)
    }
}

// ---- The kernels' work

/// The kernels of one problem, with everything that several of them need.
struct Job<'a, A, S: Gpu> {
    device: &'a S::Device,
    kind: Kind,
    targets: &'a S,
    table: Option<StorageRef<'a>>,
    params: Params<A>,
}

/// A tensor of this crate's own, which is where the logits are.
fn own<S: Gpu>(storage: &Storage) -> Result<&S> {
    S::of(storage).ok_or_else(|| {
        let device = storage.device().location();
        let message = format!("coefficients or statistics are on {device:?}, not with the logits");
        candle_core::Error::Msg(message).into()
    })
}

/// Checks what a kernel reads without a view: that it is in the dtype of the arithmetic, and all there.
fn check_numbers<S: Gpu>(what: &str, numbers: &S, dtype: DType, len: usize) -> Result<()> {
    if numbers.dtype() == dtype && numbers.len() >= len {
        return Ok(());
    }
    let (found, there) = (numbers.dtype(), numbers.len());
    let message = format!("{there} {what} in {found:?} were given, expected {len} in {dtype:?}");
    Err(candle_core::Error::Msg(message).into())
}

impl<'a, A: WithDType + Default, S: Gpu> Job<'a, A, S> {
    /// For logits of the dtype, contiguous and whole until the parameters say otherwise.
    fn new(
        problem: &'a Problem,
        device: &'a S::Device,
        logits: DType,
        targets: Operand<'a, S>,
        num_rows: usize,
    ) -> Result<Self> {
        let is_class = targets.0.dtype().is_int();
        let num_classes = problem.num_classes as u64;
        let mut params = Params {
            targets: View::new(targets, (!is_class).then_some(problem.class_dim))?,
            num_rows: num_rows as u64,
            num_classes,
            range: num_classes,
            positions: 1,
            ignores: problem.ignore_index.is_some().into(),
            ignore_index: problem.ignore_index.unwrap_or(0),
            z_loss: A::from_f64(problem.z_loss),
            ..Params::default()
        };
        let table = match &problem.coefficients {
            Coefficients::Uniform(of_all) => {
                params.scale = A::from_f64(of_all.scale);
                params.spread = A::from_f64(of_all.spread);
                params.own = A::from_f64(of_all.own);
                params.weight = A::from_f64(of_all.weight);
                None
            }
            Coefficients::PerClass(table) => Some(table.storage_and_layout().0),
        };
        let kind = Kind { logits, targets: targets.0.dtype(), per_class: table.is_some() };
        Ok(Self { device, kind, targets: targets.0, table, params })
    }

    fn kernel(&self, name: &'static str) -> Kernel {
        Kernel { name, kind: self.kind }
    }

    fn table(&self) -> Result<Buffer<'_, S>> {
        let Some(table) = &self.table else {
            return Ok(Buffer::Unused);
        };
        let table = own::<S>(table)?;
        check_numbers("coefficients", table, A::DTYPE, 4 * self.params.num_classes as usize)?;
        Ok(Buffer::In(table))
    }

    fn alloc(&self, len: usize) -> Result<S> {
        Ok(S::alloc(self.device, len, A::DTYPE)?)
    }

    /// Every row's losses, and whatever else there is room for.
    fn forward(&mut self, logits: &S, out: &mut RowResults<S>) -> Result<()> {
        if self.params.num_rows == 0 {
            return Ok(());
        }
        let along_rows = self.params.logits.is_along_rows();
        let limits = S::limits(self.device, self.kernel("forward"))?;
        let size = self.params.share(limits, self.kind.logits, along_rows, TASKS_FORWARD);
        self.params.wants_weights = out.weights.is_some().into();
        self.params.wants_statistics = out.statistics.is_some().into();
        if self.params.segments == 1 {
            return self.launch_forward(size, logits, None, out);
        }
        let len = PART * (self.params.segments * self.params.num_rows) as usize;
        let mut parts = self.alloc(len)?;
        self.params.num_parts = self.params.segments;
        self.launch_forward(size, logits, Some(&mut parts), out)?;
        self.finish(&parts, out)
    }

    /// Reads the logits of a range of the classes, for the parts of each row or at once for its results.
    fn launch_forward(
        &mut self,
        size: (usize, usize),
        logits: &S,
        parts: Option<&mut S>,
        out: &mut RowResults<S>,
    ) -> Result<()> {
        self.params.wants_parts = parts.is_some().into();
        let mut buffers = [
            Buffer::In(logits),
            Buffer::In(self.targets),
            self.table()?,
            parts.map_or(Buffer::Unused, Buffer::Out),
            Buffer::Out(&mut out.losses),
            Buffer::maybe_out(&mut out.weights),
            Buffer::maybe_out(&mut out.statistics),
        ];
        // SAFETY: the views were checked against the storages; the parts and results have room for every
        // row, and the kernel writes only those asked for; a target is compared with the number of classes
        // before anything is read by it.
        unsafe {
            S::launch(self.device, self.kernel("forward"), size, &mut buffers, &self.params)?
        };
        Ok(())
    }

    /// The results from the parts of each row.
    fn finish(&self, parts: &S, out: &mut RowResults<S>) -> Result<()> {
        let kernel = self.kernel("finish");
        let limits = S::limits(self.device, kernel)?;
        let threads = limits.most_threads();
        let lanes = (self.params.num_parts as usize).min(limits.warp).next_power_of_two();
        let params = Params { lanes: lanes as u32, along_rows: 0, segments: 1, ..self.params };
        let groups = (self.params.num_rows as usize).div_ceil(threads / lanes);
        let size = (groups.min(limits.groups), threads);
        let mut buffers = [
            Buffer::In(self.targets),
            self.table()?,
            Buffer::In(parts),
            Buffer::Out(&mut out.losses),
            Buffer::maybe_out(&mut out.weights),
            Buffer::maybe_out(&mut out.statistics),
        ];
        // SAFETY: as for `forward`; there are `num_parts` parts.
        unsafe { S::launch(self.device, kernel, size, &mut buffers, &params)? };
        Ok(())
    }

    /// The gradient of the logits of a range of the classes.
    fn backward(
        &mut self,
        logits: &S,
        upstream: &S,
        statistics: &S,
        gradient: &mut S,
    ) -> Result<()> {
        if self.params.num_rows == 0 {
            return Ok(());
        }
        let along_rows = self.params.positions > 1;
        let kernel = self.kernel("backward");
        let limits = S::limits(self.device, kernel)?;
        let size = self.params.share(limits, self.kind.logits, along_rows, TASKS_BACKWARD);
        let mut buffers = [
            Buffer::In(logits),
            Buffer::In(self.targets),
            self.table()?,
            Buffer::In(upstream),
            Buffer::In(statistics),
            Buffer::Out(gradient),
        ];
        // SAFETY: as for `forward`; the gradient has an element for each logit, and there are three
        // statistics for each row.
        unsafe { S::launch(self.device, kernel, size, &mut buffers, &self.params)? };
        Ok(())
    }

    /// The sum of the losses, divided, and what it was divided by if that is the sum of the weights.
    fn reduce(&self, rows: RowResults<S>, reduce: Reduce) -> Result<(S, Option<S>)> {
        let (divisor, mean) = match reduce {
            // Nothing to add up.
            Reduce::No => return Ok((rows.losses, None)),
            Reduce::DividedBy(divisor) => (divisor, divisor != 1.),
            // The weights' sum takes the number's place.
            Reduce::DividedByWeights => (1., true),
        };
        let RowResults { mut losses, mut weights, .. } = rows;
        let kernel = self.kernel("reduce");
        let limits = S::limits(self.device, kernel)?;
        // More groups than a launch may have cannot be left to others: pieces are as large as it takes.
        let piece = PIECE.max((self.params.num_rows as usize).div_ceil(limits.groups));
        let mut len = self.params.num_rows as usize;
        let mut scale = match mean {
            true => 1. / len.max(1).next_power_of_two() as f64,
            false => 1.,
        };
        let unscale = A::from_f64(1. / scale);
        loop {
            let groups = len.div_ceil(piece).max(1);
            let params = Reduction {
                len: len as u64,
                piece: piece as u64,
                weighted: weights.is_some().into(),
                divides: (groups == 1).into(),
                divisor: A::from_f64(divisor),
                scale: A::from_f64(scale),
                unscale,
            };
            let mut sums = self.alloc(groups)?;
            let mut sums_of_weights = weights.as_ref().map(|_| self.alloc(groups)).transpose()?;
            let mut buffers = [
                Buffer::In(&losses),
                Buffer::maybe_in(weights.as_ref()),
                Buffer::Out(&mut sums),
                Buffer::maybe_out(&mut sums_of_weights),
            ];
            let size = (groups, limits.most_threads());
            // SAFETY: there are `len` losses, as many weights if any, and a sum for each group.
            unsafe { S::launch(self.device, kernel, size, &mut buffers, &params)? };
            (losses, weights) = (sums, sums_of_weights);
            if groups == 1 {
                return Ok((losses, weights));
            }
            (len, scale) = (groups, 1.);
        }
    }
}

/// What the forward kernel gives, each of it a number a row.
struct RowResults<S> {
    losses: S,
    /// The rows' class weights, 0 for ignored rows.
    weights: Option<S>,
    /// Three numbers a row, each for all rows: the maximum, Σ exp(x − maximum), and S.
    statistics: Option<S>,
}

fn num_rows(layout: &Layout, class_dim: usize) -> usize {
    let others = layout.dims().iter().enumerate().filter(|(dim, _)| *dim != class_dim);
    others.map(|(_, len)| len).product()
}

/// Every row's loss, or their sum.
pub(crate) fn forward<S: Gpu>(
    problem: &Problem,
    logits: Operand<S>,
    targets: Operand<S>,
    reduce: Reduce,
    statistics: bool,
) -> Result<Forward<S>> {
    match logits.0.dtype() {
        DType::F64 => forward_in::<f64, S>(problem, logits, targets, reduce, statistics),
        _ => forward_in::<f32, S>(problem, logits, targets, reduce, statistics),
    }
}

fn forward_in<A: WithDType + Default, S: Gpu>(
    problem: &Problem,
    logits: Operand<S>,
    targets: Operand<S>,
    reduce: Reduce,
    statistics: bool,
) -> Result<Forward<S>> {
    let num_rows = num_rows(logits.1, problem.class_dim);
    let mut job =
        Job::<A, S>::new(problem, logits.0.device(), logits.0.dtype(), targets, num_rows)?;
    job.params.logits = View::new(logits, Some(problem.class_dim))?;
    let weighted = matches!(reduce, Reduce::DividedByWeights);
    let mut rows = RowResults {
        losses: job.alloc(num_rows)?,
        weights: weighted.then(|| job.alloc(num_rows)).transpose()?,
        statistics: statistics.then(|| job.alloc(3 * num_rows)).transpose()?,
    };
    job.forward(logits.0, &mut rows)?;
    let statistics = rows.statistics.take();
    let (result, divisor) = job.reduce(rows, reduce)?;
    Ok(Forward { result, divisor, statistics })
}

/// The gradient of the logits, in their dtype and shape, contiguous.
pub(crate) fn backward<S: Gpu>(
    problem: &Problem,
    logits: Operand<S>,
    targets: Operand<S>,
    upstream: Operand<S>,
    statistics: &Tensor,
) -> Result<S> {
    match logits.0.dtype() {
        DType::F64 => backward_in::<f64, S>(problem, logits, targets, upstream, statistics),
        _ => backward_in::<f32, S>(problem, logits, targets, upstream, statistics),
    }
}

fn backward_in<A: WithDType + Default, S: Gpu>(
    problem: &Problem,
    logits: Operand<S>,
    targets: Operand<S>,
    upstream: Operand<S>,
    statistics: &Tensor,
) -> Result<S> {
    let (dims, dtype) = (logits.1.dims(), logits.0.dtype());
    let num_rows = num_rows(logits.1, problem.class_dim);
    let positions: usize = dims.iter().skip(problem.class_dim + 1).product();
    let mut job = Job::<A, S>::new(problem, logits.0.device(), dtype, targets, num_rows)?;
    check_numbers("upstream gradients", upstream.0, A::DTYPE, num_rows.min(1))?;
    job.params.logits = View::new(logits, Some(problem.class_dim))?;
    job.params.upstream = View::new(upstream, None)?;
    job.params.positions = positions as u64;
    let mut gradient = S::alloc(job.device, logits.1.shape().elem_count(), dtype)?;
    let statistics = statistics.storage_and_layout().0;
    let statistics = own::<S>(&statistics)?;
    check_numbers("statistics", statistics, A::DTYPE, 3 * num_rows)?;
    job.backward(logits.0, upstream.0, statistics, &mut gradient)?;
    Ok(gradient)
}

/// Smoothed targets, f32.
pub(crate) fn smooth<S: Gpu>(problem: &Problem, labels: Operand<S>) -> Result<S> {
    let num_rows = match labels.0.dtype().is_int() {
        true => labels.1.shape().elem_count(),
        false => num_rows(labels.1, problem.class_dim),
    };
    let mut job = Job::<f32, S>::new(problem, labels.0.device(), DType::F32, labels, num_rows)?;
    let mut soft = job.alloc(num_rows * problem.num_classes)?;
    if num_rows == 0 {
        return Ok(soft);
    }
    let kernel = job.kernel("smooth");
    let limits = S::limits(job.device, kernel)?;
    let size = job.params.share(limits, DType::F32, false, TASKS_BACKWARD);
    let mut buffers = [Buffer::In(job.targets), job.table()?, Buffer::Out(&mut soft)];
    // SAFETY: as for `forward`; there is an element for each row and class.
    unsafe { S::launch(job.device, kernel, size, &mut buffers, &job.params)? };
    Ok(soft)
}

#[cfg(all(test, emulator))]
mod tests {
    use super::*;
    use crate::backend::Coefficient;
    use candle_core::cpu_backend::CpuDevice;
    use candle_core::{CpuStorage, Device};

    const ROWS: usize = 5;
    const CLASSES: usize = 100;

    fn operand(tensor: &Tensor) -> (StorageRef<'_>, &Layout) {
        let (storage, layout) = tensor.storage_and_layout();
        (storage, layout)
    }

    fn numbers(storage: &CpuStorage) -> &[f64] {
        match storage {
            CpuStorage::F64(numbers) => numbers,
            other => panic!("{other:?} is not f64"),
        }
    }

    fn close(ours: &[f64], theirs: &[f64]) {
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(theirs) {
            let close = (ours - theirs).abs() <= 1e-13 * theirs.abs().max(1.);
            assert!(close || ours.is_nan() && theirs.is_nan(), "{ours} and {theirs}");
        }
    }

    /// The rows' losses from ranges of the classes, each in a tensor of its own, are those from all of them;
    /// and so is the gradient.
    fn check(targets: &Tensor, ranges: &[usize], coefficients: Coefficients) -> Result<()> {
        let problem = Problem {
            class_dim: 1,
            num_classes: CLASSES,
            coefficients,
            ignore_index: None,
            z_loss: 0.01,
        };
        let logits = (Tensor::arange(0., (ROWS * CLASSES) as f64, &Device::Cpu)?.sin()? * 5.)?;
        let logits = logits.reshape((ROWS, CLASSES))?;
        let (targets, targets_layout) = operand(targets);
        let targets = (own::<CpuStorage>(&targets)?, targets_layout);
        let (all, layout) = operand(&logits);
        let all = (own::<CpuStorage>(&all)?, layout);
        let expected = forward(&problem, all, targets, Reduce::No, true)?;

        let mut job = Job::<f64, CpuStorage>::new(&problem, &CpuDevice, DType::F64, targets, ROWS)?;
        let mut rows = RowResults {
            losses: job.alloc(ROWS)?,
            weights: None,
            statistics: Some(job.alloc(3 * ROWS)?),
        };
        // Some ranges are read by several groups of threads.
        let mut parts = job.alloc(PART * ROWS * 3 * ranges.len())?;
        let mut start = 0;
        for &len in ranges {
            let range = logits.narrow(1, start, len)?.contiguous()?;
            let (range, layout) = operand(&range);
            job.params.logits = View::new((own::<CpuStorage>(&range)?, layout), Some(1))?;
            (job.params.first_class, job.params.range) = (start as u64, len as u64);
            job.params.first_part = job.params.num_parts;
            let limits = CpuStorage::limits(&CpuDevice, job.kernel("forward"))?;
            job.params.share(limits, DType::F64, false, TASKS_FORWARD);
            job.params.segment = len.div_ceil(3) as u64;
            job.params.segments = 3;
            job.params.wants_statistics = 1;
            let size = (2, limits.warp.max(job.params.lanes as usize));
            job.launch_forward(size, own(&range)?, Some(&mut parts), &mut rows)?;
            job.params.num_parts += 3;
            start += len;
        }
        job.finish(&parts, &mut rows)?;
        close(numbers(&rows.losses), numbers(&expected.result));
        let (Some(ours), Some(theirs)) = (rows.statistics, expected.statistics) else {
            panic!("no statistics");
        };
        close(numbers(&ours), numbers(&theirs));

        let upstream = Tensor::arange(1., ROWS as f64 + 1., &Device::Cpu)?;
        let (upstream, upstream_layout) = operand(&upstream);
        let upstream = (own::<CpuStorage>(&upstream)?, upstream_layout);
        let saved = Tensor::from_vec(numbers(&theirs).to_vec(), (3, ROWS), &Device::Cpu)?;
        let expected = backward(&problem, all, targets, upstream, &saved)?;
        job.params.upstream = View::new(upstream, None)?;
        let mut start = 0;
        for &len in ranges {
            let range = logits.narrow(1, start, len)?.contiguous()?;
            let (range, layout) = operand(&range);
            job.params.logits = View::new((own::<CpuStorage>(&range)?, layout), Some(1))?;
            (job.params.first_class, job.params.range) = (start as u64, len as u64);
            let mut gradient = job.alloc(ROWS * len)?;
            job.backward(own(&range)?, upstream.0, &ours, &mut gradient)?;
            for (row, ours) in numbers(&gradient).chunks(len).enumerate() {
                let whole = &numbers(&expected)[row * CLASSES..];
                close(ours, &whole[start..start + len]);
            }
            start += len;
        }
        Ok(())
    }

    #[test]
    fn ranges_of_classes_make_a_row() -> Result<()> {
        let labels = Tensor::new(&[0i64, 29, 30, 99, 200], &Device::Cpu)?;
        let probabilities = (Tensor::arange(0., (ROWS * CLASSES) as f64, &Device::Cpu)? * 1e-3)?;
        let probabilities = probabilities.reshape((ROWS, CLASSES))?;
        let uniform = Coefficient { scale: 0.9, spread: 1e-3, own: 0.901, weight: 1. };
        let table = Tensor::arange(0., (4 * CLASSES) as f64, &Device::Cpu)?;
        let table = table.reshape((4, CLASSES))?;
        for targets in [labels, probabilities] {
            for ranges in [&[100][..], &[30, 70], &[1, 29, 64, 6], &[33, 33, 34]] {
                check(&targets, ranges, Coefficients::Uniform(uniform))?;
                check(&targets, ranges, Coefficients::PerClass(table.clone()))?;
            }
        }
        Ok(())
    }
}
