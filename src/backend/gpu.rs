//! What the GPU backends share: which kernel runs, over how many threads, and with what numbers.
//!
//! A backend's source is compiled for one [`Kind`] of input at a time, and has the kernels
//!
//! ```text
//! forward    the losses, or what a range of the classes says of each row (its part)
//! finish     the losses from all parts of each row, or one part of them
//! reduce     the sum of the losses, divided
//! backward   the gradient of the logits
//! smooth     the coefficients of all classes themselves
//! ```
//!
//! Nothing here waits for the device: kernels are put into its queue, and no number comes back.

use super::{Coefficients, Forward, Operand, Problem, Reduce, Rows, check_layout, num_rows};
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
    ignore_index: i64,
    ignores: u32,
    along_rows: u32,
    lanes: u32,
    wants_parts: u32,
    wants_weights: u32,
    wants_statistics: u32,
    continues: u32,
    in_place: u32,
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

/// Checks that a tensor of this crate's own is all that its storage holds.
fn check_whole<S: Gpu>(what: &str, storage: &S, layout: &Layout) -> Result<()> {
    match layout.contiguous_offsets() {
        Some((0, end)) if end <= storage.len() => Ok(()),
        _ => Err(candle_core::Error::Msg(format!("the {what} are not contiguous")).into()),
    }
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
            first_class: problem.first_class as u64,
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

    /// The rows are those of the logits.
    fn set_logits(&mut self, problem: &Problem, logits: Operand<S>) -> Result<()> {
        self.params.logits = View::new(logits, Some(problem.class_dim))?;
        self.params.range = logits.1.dims().get(problem.class_dim).map_or(0, |&len| len as u64);
        Ok(())
    }

    /// What the logits say of every row.
    fn forward(&mut self, logits: &S, out: Found<S>) -> Result<()> {
        if self.params.num_rows == 0 {
            return Ok(());
        }
        let along_rows = self.params.logits.is_along_rows();
        let limits = S::limits(self.device, self.kernel("forward"))?;
        let size = self.params.share(limits, self.kind.logits, along_rows, TASKS_FORWARD);
        if self.params.segments == 1 {
            return self.launch_forward(size, logits, out);
        }
        let num_parts = self.params.segments as usize;
        let mut parts = self.alloc(PART * num_parts * self.params.num_rows as usize)?;
        let continues = std::mem::replace(&mut self.params.continues, 0);
        self.launch_forward(size, logits, Found::Parts(&mut parts))?;
        self.params.continues = continues;
        self.finish(&parts, num_parts, out)
    }

    /// Reads the logits of a range of the classes, for the parts of each row or at once for its results.
    fn launch_forward(
        &mut self,
        size: (usize, usize),
        logits: &S,
        mut out: Found<S>,
    ) -> Result<()> {
        let [parts, losses, weights, statistics] = out.buffers(&mut self.params);
        let inputs = [Buffer::In(logits), Buffer::In(self.targets), self.table()?];
        let [logits, targets, table] = inputs;
        let mut buffers = [logits, targets, table, parts, losses, weights, statistics];
        // SAFETY: the views were checked against the storages; the parts and results have room for every
        // row, and the kernel writes only those asked for; a target is compared with the number of classes
        // before anything is read by it.
        unsafe {
            S::launch(self.device, self.kernel("forward"), size, &mut buffers, &self.params)?
        };
        Ok(())
    }

    /// The same from the parts of each row.
    fn finish(&mut self, parts: &S, num_parts: usize, mut out: Found<S>) -> Result<()> {
        if self.params.num_rows == 0 {
            return Ok(());
        }
        let kernel = self.kernel("finish");
        let limits = S::limits(self.device, kernel)?;
        let threads = limits.most_threads();
        let lanes = num_parts.min(limits.warp).next_power_of_two();
        let groups = (self.params.num_rows as usize).div_ceil(threads / lanes);
        let size = (groups.min(limits.groups), threads);
        self.params.num_parts = num_parts as u64;
        (self.params.lanes, self.params.along_rows, self.params.segments) = (lanes as u32, 0, 1);
        let [all_parts, losses, weights, statistics] = out.buffers(&mut self.params);
        let (targets, table) = (Buffer::In(self.targets), self.table()?);
        let mut buffers =
            [targets, table, Buffer::In(parts), all_parts, losses, weights, statistics];
        // SAFETY: as for `forward`; there are `num_parts` parts.
        unsafe { S::launch(self.device, kernel, size, &mut buffers, &self.params)? };
        Ok(())
    }

    /// What comes from upstream to each row of logits of these dimensions.
    fn set_upstream(
        &mut self,
        problem: &Problem,
        dims: &[usize],
        upstream: Operand<S>,
    ) -> Result<()> {
        let some = self.params.num_rows.min(1) as usize;
        check_numbers("upstream gradients", upstream.0, A::DTYPE, some)?;
        self.params.upstream = View::new(upstream, None)?;
        self.params.positions =
            dims.iter().skip(problem.class_dim + 1).map(|&len| len as u64).product();
        Ok(())
    }

    /// The gradient of the logits of a range of the classes; in their place, if there are none.
    fn backward(
        &mut self,
        logits: Option<&S>,
        upstream: &S,
        statistics: &S,
        gradient: &mut S,
    ) -> Result<()> {
        check_numbers("statistics", statistics, A::DTYPE, 3 * self.params.num_rows as usize)?;
        if self.params.num_rows == 0 {
            return Ok(());
        }
        let along_rows = self.params.positions > 1;
        let kernel = self.kernel("backward");
        let limits = S::limits(self.device, kernel)?;
        let size = self.params.share(limits, self.kind.logits, along_rows, TASKS_BACKWARD);
        self.params.in_place = logits.is_none().into();
        let mut buffers = [
            Buffer::maybe_in(logits),
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

    /// The rows' results as `find` finds them, reduced.
    fn results(
        mut self,
        reduce: Reduce,
        statistics: bool,
        find: impl FnOnce(&mut Self, Found<S>) -> Result<()>,
    ) -> Result<Forward<S>> {
        let num_rows = self.params.num_rows as usize;
        let weighted = matches!(reduce, Reduce::DividedByWeights);
        let mut rows = RowResults {
            losses: self.alloc(num_rows)?,
            weights: weighted.then(|| self.alloc(num_rows)).transpose()?,
            statistics: statistics.then(|| self.alloc(3 * num_rows)).transpose()?,
        };
        find(&mut self, Found::Results(&mut rows))?;
        let statistics = rows.statistics.take();
        let (result, divisor) = self.reduce(rows, reduce)?;
        Ok(Forward { result, divisor, statistics })
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

/// Where a kernel puts what it has found out of every row.
enum Found<'a, S> {
    /// A part for each segment.
    Parts(&'a mut S),
    Results(&'a mut RowResults<S>),
}

impl<S> Found<'_, S> {
    /// The buffers of the parts, the losses, the weights and the statistics, and in the parameters which of
    /// them there are.
    fn buffers<A>(&mut self, params: &mut Params<A>) -> [Buffer<'_, S>; 4] {
        let unused = || Buffer::Unused;
        params.wants_parts = matches!(self, Self::Parts(_)).into();
        match self {
            Self::Parts(parts) => [Buffer::Out(parts), unused(), unused(), unused()],
            Self::Results(RowResults { losses, weights, statistics }) => {
                params.wants_weights = weights.is_some().into();
                params.wants_statistics = statistics.is_some().into();
                let (weights, statistics) =
                    (Buffer::maybe_out(weights), Buffer::maybe_out(statistics));
                [unused(), Buffer::Out(losses), weights, statistics]
            }
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
    let num_rows = num_rows(logits.1.dims(), problem.class_dim);
    let mut job =
        Job::<A, S>::new(problem, logits.0.device(), logits.0.dtype(), targets, num_rows)?;
    job.set_logits(problem, logits)?;
    job.results(reduce, statistics, |job, rows| job.forward(logits.0, rows))
}

/// The forward kernel on a range of the classes, whose logits are given: what it says of each row is merged
/// into what the ranges before it have said, if this is not the first.
pub(crate) fn add_range<S: Gpu>(
    problem: &Problem,
    parts: (&mut S, &Layout),
    logits: Operand<S>,
    targets: Operand<S>,
) -> Result<()> {
    match logits.0.dtype() {
        DType::F64 => add_range_in::<f64, S>(problem, parts, logits, targets),
        _ => add_range_in::<f32, S>(problem, parts, logits, targets),
    }
}

fn add_range_in<A: WithDType + Default, S: Gpu>(
    problem: &Problem,
    (parts, layout): (&mut S, &Layout),
    logits: Operand<S>,
    targets: Operand<S>,
) -> Result<()> {
    let num_rows = num_rows(logits.1.dims(), problem.class_dim);
    let device = logits.0.device();
    let mut job = Job::<A, S>::new(problem, device, logits.0.dtype(), targets, num_rows)?;
    job.set_logits(problem, logits)?;
    check_whole("parts", parts, layout)?;
    check_numbers("parts", parts, A::DTYPE, PART * num_rows)?;
    job.params.continues = (problem.first_class > 0).into();
    job.forward(logits.0, Found::Parts(parts))
}

/// Every row's loss, or their sum, from what was kept of the ranges, whose logits had this dtype.
pub(crate) fn finish<S: Gpu>(
    problem: &Problem,
    logits: DType,
    parts: Operand<S>,
    targets: Operand<S>,
    reduce: Reduce,
    statistics: bool,
) -> Result<Forward<S>> {
    match logits {
        DType::F64 => finish_in::<f64, S>(problem, logits, parts, targets, reduce, statistics),
        _ => finish_in::<f32, S>(problem, logits, parts, targets, reduce, statistics),
    }
}

fn finish_in<A: WithDType + Default, S: Gpu>(
    problem: &Problem,
    logits: DType,
    (parts, layout): Operand<S>,
    targets: Operand<S>,
    reduce: Reduce,
    statistics: bool,
) -> Result<Forward<S>> {
    let num_rows = layout.shape().elem_count() / PART;
    let job = Job::<A, S>::new(problem, parts.device(), logits, targets, num_rows)?;
    check_whole("parts", parts, layout)?;
    check_numbers("parts", parts, A::DTYPE, PART * num_rows)?;
    job.results(reduce, statistics, |job, rows| job.finish(parts, 1, rows))
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
    let num_rows = num_rows(dims, problem.class_dim);
    let mut job = Job::<A, S>::new(problem, logits.0.device(), dtype, targets, num_rows)?;
    job.set_logits(problem, logits)?;
    job.set_upstream(problem, dims, upstream)?;
    let mut gradient = S::alloc(job.device, logits.1.shape().elem_count(), dtype)?;
    let statistics = statistics.storage_and_layout().0;
    job.backward(Some(logits.0), upstream.0, own(&statistics)?, &mut gradient)?;
    Ok(gradient)
}

/// The backward kernel with the gradient in the logits' place.
pub(crate) fn backward_in_place<S: Gpu>(
    problem: &Problem,
    logits: (&mut S, &Layout),
    targets: Operand<S>,
    upstream: Operand<S>,
    statistics: &Tensor,
) -> Result<()> {
    match logits.0.dtype() {
        DType::F64 => replace::<f64, S>(problem, logits, targets, upstream, statistics),
        _ => replace::<f32, S>(problem, logits, targets, upstream, statistics),
    }
}

fn replace<A: WithDType + Default, S: Gpu>(
    problem: &Problem,
    (logits, layout): (&mut S, &Layout),
    targets: Operand<S>,
    upstream: Operand<S>,
    statistics: &Tensor,
) -> Result<()> {
    let num_rows = num_rows(layout.dims(), problem.class_dim);
    let device = targets.0.device();
    let mut job = Job::<A, S>::new(problem, device, logits.dtype(), targets, num_rows)?;
    check_whole("logits", logits, layout)?;
    job.set_logits(problem, (&*logits, layout))?;
    job.set_upstream(problem, layout.dims(), upstream)?;
    let statistics = statistics.storage_and_layout().0;
    job.backward(None, upstream.0, own(&statistics)?, logits)
}

/// Smoothed targets, f32.
pub(crate) fn smooth<S: Gpu>(problem: &Problem, labels: Operand<S>) -> Result<S> {
    let num_rows = match labels.0.dtype().is_int() {
        true => labels.1.shape().elem_count(),
        false => num_rows(labels.1.dims(), problem.class_dim),
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
