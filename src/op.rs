//! The way from candle's tensors to a backend, and the autograd node.
//!
//! The loss is computed first, by kernels that know nothing of a graph, and then handed to the
//! graph as the result of one node whose backward asks the backend for the gradient.

#[cfg(feature = "cuda")]
use crate::backend::cuda;
#[cfg(feature = "metal")]
use crate::backend::metal;
use crate::backend::{self, Problem, Reduce, host, result_dtype, row_shape};
use crate::error::Result;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
#[cfg(feature = "metal")]
use candle_core::MetalStorage;
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, InplaceOp3, Layout, Shape, Storage,
    Tensor,
};
use std::sync::OnceLock;

/// The methods of an op of candle's, one a backend, each by a macro that gets the method's name, the storage's
/// type and variant, and the backend's module.
macro_rules! each_backend {
    ($method:ident) => {
        $method!(cpu_fwd, CpuStorage, Cpu, host);
        #[cfg(feature = "cuda")]
        $method!(cuda_fwd, CudaStorage, Cuda, cuda);
        #[cfg(feature = "metal")]
        $method!(metal_fwd, MetalStorage, Metal, metal);
    };
}

// ---- The losses

/// What the forward kernel gives.
pub(crate) struct Losses {
    /// The losses, in the logits' shape without the class dimension; or the scalar that they were reduced
    /// to.
    pub result: Tensor,
    pub reduced: Reduced,
    /// What backward needs again, if it was asked for.
    pub statistics: Option<Tensor>,
}

/// How the row losses became the result: they were left as they are, or added up and divided.
#[derive(Debug)]
pub(crate) enum Reduced {
    No,
    By(Divisor),
}

/// What a sum of losses is divided by.
#[derive(Debug)]
pub(crate) enum Divisor {
    Number(f64),
    /// A scalar that is known on the device alone.
    Tensor(Tensor),
}

impl Reduced {
    /// The gradient of each row's loss, given that of the result.
    pub fn upstream(&self, gradient: &Tensor, rows: Vec<usize>) -> candle_core::Result<Tensor> {
        match self {
            Self::No => Ok(gradient.clone()),
            Self::By(divisor) => divisor.divide(gradient)?.broadcast_as(rows),
        }
    }
}

impl Divisor {
    /// `tensor` / self, in the tensor's dtype.
    fn divide(&self, tensor: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Number(number) => tensor / *number,
            Self::Tensor(divisor) => {
                tensor.to_dtype(divisor.dtype())?.div(divisor)?.to_dtype(tensor.dtype())
            }
        }
    }
}

/// Runs the forward kernel.
pub(crate) fn forward(
    problem: &Problem,
    logits: &Tensor,
    targets: &Tensor,
    reduce: Reduce,
    statistics: bool,
) -> Result<Losses> {
    let rows = row_shape(logits.dims(), problem.class_dim);
    Forward { problem, reduce, statistics, rows, parts_of: None, others: OnceLock::new() }
        .apply(logits, targets)
}

/// What the forward kernel keeps of each row while it is given one range of the classes after the other.
pub(crate) struct Parts {
    /// Four numbers a row, each for all rows.
    numbers: Tensor,
    /// The dtype of the logits.
    logits: DType,
}

impl Parts {
    /// Room for the parts of so many rows, of which nothing is known yet.
    pub fn new(num_rows: usize, logits: DType, device: &Device) -> Result<Self> {
        let dtype = match device {
            Device::Cpu => host::parts_dtype(logits),
            _ => result_dtype(logits),
        };
        Ok(Self { numbers: Tensor::zeros((4, num_rows), dtype, device)?, logits })
    }

    /// Runs the forward kernel on a range of the classes: the first ones, or those after the ranges before.
    pub fn add_range(&self, problem: &Problem, logits: &Tensor, targets: &Tensor) -> Result<()> {
        Ok(self.numbers.inplace_op3(logits, targets, &AddRange { problem })?)
    }

    /// The rows of several, one after the other.
    pub fn join(all: &[Self], logits: DType, device: &Device) -> Result<Self> {
        match all {
            [] => Self::new(0, logits, device),
            _ => {
                let numbers: Vec<_> = all.iter().map(|parts| &parts.numbers).collect();
                Ok(Self { numbers: Tensor::cat(&numbers, 1)?, logits })
            }
        }
    }

    /// What [`forward`] gives, once all ranges were added.
    pub fn finish(
        &self,
        problem: &Problem,
        rows: Vec<usize>,
        targets: &Tensor,
        reduce: Reduce,
        statistics: bool,
    ) -> Result<Losses> {
        let parts_of = Some(self.logits);
        Forward { problem, reduce, statistics, rows, parts_of, others: OnceLock::new() }
            .apply(&self.numbers, targets)
    }
}

/// The forward kernel as an op of candle's, which picks the backend and lends the storages.
struct Forward<'a> {
    problem: &'a Problem,
    reduce: Reduce,
    /// Whether there are to be any.
    statistics: bool,
    /// The shape of the rows.
    rows: Vec<usize>,
    /// If the op is given parts in place of logits, the dtype of these.
    parts_of: Option<DType>,
    /// What there is besides the result: the divisor and the statistics.
    others: OnceLock<(Option<Tensor>, Option<Tensor>)>,
}

impl Forward<'_> {
    fn apply(self, given: &Tensor, targets: &Tensor) -> Result<Losses> {
        let result = given.apply_op2_no_bwd(targets, &self)?;
        let (divisor, statistics) = self.others.into_inner().unwrap_or_default();
        let reduced = match (self.reduce, divisor) {
            (Reduce::DividedBy(number), _) => Reduced::By(Divisor::Number(number)),
            (_, Some(divisor)) => Reduced::By(Divisor::Tensor(divisor)),
            (_, None) => Reduced::No,
        };
        Ok(Losses { result, reduced, statistics })
    }

    fn keep<S>(&self, out: backend::Forward<S>, storage: fn(S) -> Storage) -> (S, Shape) {
        let num_rows = self.rows.iter().product::<usize>();
        let constant = |numbers: S, shape: Shape| {
            Tensor::from_storage(storage(numbers), shape, BackpropOp::none(), false)
        };
        self.others.get_or_init(|| {
            let divisor = out.divisor.map(|divisor| constant(divisor, ().into()));
            let statistics = out.statistics.map(|saved| constant(saved, (3, num_rows).into()));
            (divisor, statistics)
        });
        let shape = match self.reduce {
            Reduce::No => self.rows.clone().into(),
            Reduce::DividedBy(_) | Reduce::DividedByWeights => ().into(),
        };
        (out.result, shape)
    }
}

macro_rules! losses {
    ($method:ident, $storage:ident, $variant:ident, $backend:ident) => {
        fn $method(
            &self,
            given: &$storage,
            given_layout: &Layout,
            targets: &$storage,
            targets_layout: &Layout,
        ) -> candle_core::Result<($storage, Shape)> {
            let (given, targets) = ((given, given_layout), (targets, targets_layout));
            let Self { problem, reduce, statistics, .. } = self;
            let out = match self.parts_of {
                None => $backend::forward(problem, given, targets, *reduce, *statistics)?,
                Some(dtype) => {
                    $backend::finish(problem, dtype, given, targets, *reduce, *statistics)?
                }
            };
            Ok(self.keep(out, Storage::$variant))
        }
    };
}

impl CustomOp2 for Forward<'_> {
    fn name(&self) -> &'static str {
        "label-smoothing-loss"
    }

    each_backend!(losses);
}

/// The forward kernel on a range of the classes, in place on the parts.
struct AddRange<'a> {
    problem: &'a Problem,
}

macro_rules! add_range {
    ($method:ident, $storage:ident, $variant:ident, $backend:ident) => {
        fn $method(
            &self,
            parts: &mut $storage,
            parts_layout: &Layout,
            logits: &$storage,
            logits_layout: &Layout,
            targets: &$storage,
            targets_layout: &Layout,
        ) -> candle_core::Result<()> {
            Ok($backend::add_range(
                self.problem,
                (parts, parts_layout),
                (logits, logits_layout),
                (targets, targets_layout),
            )?)
        }
    };
}

impl InplaceOp3 for AddRange<'_> {
    fn name(&self) -> &'static str {
        "label-smoothing-loss-of-range"
    }

    each_backend!(add_range);
}

// ---- The gradient

/// Runs the backward kernel. `upstream` is the gradient of each row's loss.
pub(crate) fn gradient_of(
    problem: &Problem,
    statistics: &Tensor,
    logits: &Tensor,
    targets: &Tensor,
    upstream: &Tensor,
) -> candle_core::Result<Tensor> {
    logits.apply_op3_no_bwd(targets, upstream, &Backward { problem, statistics })
}

/// The same in place of the logits: a contiguous tensor that nobody else needs, whose dtype on the CPU is one
/// of the arithmetic.
pub(crate) fn replace_by_gradient(
    problem: &Problem,
    statistics: &Tensor,
    logits: &Tensor,
    targets: &Tensor,
    upstream: &Tensor,
) -> candle_core::Result<()> {
    logits.inplace_op3(targets, upstream, &Backward { problem, statistics })
}

/// The backward kernel: logits, targets and the rows' upstream gradients in, the gradient out.
struct Backward<'a> {
    problem: &'a Problem,
    statistics: &'a Tensor,
}

macro_rules! gradient {
    ($method:ident, $storage:ident, $variant:ident, $backend:ident) => {
        fn $method(
            &self,
            logits: &$storage,
            logits_layout: &Layout,
            targets: &$storage,
            targets_layout: &Layout,
            upstream: &$storage,
            upstream_layout: &Layout,
        ) -> candle_core::Result<($storage, Shape)> {
            let gradient = $backend::backward(
                self.problem,
                (logits, logits_layout),
                (targets, targets_layout),
                (upstream, upstream_layout),
                self.statistics,
            )?;
            Ok((gradient, logits_layout.shape().clone()))
        }
    };
}

impl CustomOp3 for Backward<'_> {
    fn name(&self) -> &'static str {
        "label-smoothing-loss-backward"
    }

    each_backend!(gradient);
}

macro_rules! gradient_in_place {
    ($method:ident, $storage:ident, $variant:ident, $backend:ident) => {
        fn $method(
            &self,
            logits: &mut $storage,
            logits_layout: &Layout,
            targets: &$storage,
            targets_layout: &Layout,
            upstream: &$storage,
            upstream_layout: &Layout,
        ) -> candle_core::Result<()> {
            Ok($backend::backward_in_place(
                self.problem,
                (logits, logits_layout),
                (targets, targets_layout),
                (upstream, upstream_layout),
                self.statistics,
            )?)
        }
    };
}

impl InplaceOp3 for Backward<'_> {
    fn name(&self) -> &'static str {
        "label-smoothing-loss-backward-in-place"
    }

    each_backend!(gradient_in_place);
}

// ---- The graph

/// Puts a result that was computed before into the graph, as one that depends on three tensors. `gradients` gets
/// these and the result's gradient, and gives that of each of them that is tracked.
pub(crate) fn graft(
    result: &Tensor,
    on: [&Tensor; 3],
    gradients: impl Fn([&Tensor; 3], &Tensor) -> candle_core::Result<[Option<Tensor>; 3]>
    + Send
    + Sync
    + 'static,
) -> Result<Tensor> {
    let [a, b, c] = on;
    Ok(a.apply_op3(b, c, Node { result: result.clone(), gradients })?)
}

/// The node of the graph. Its forward hands the result over: one number, or one a row.
struct Node<F> {
    result: Tensor,
    gradients: F,
}

macro_rules! hand_over {
    ($method:ident, $storage:ident, $variant:ident, $backend:ident) => {
        fn $method(
            &self,
            _: &$storage,
            _: &Layout,
            _: &$storage,
            _: &Layout,
            _: &$storage,
            _: &Layout,
        ) -> candle_core::Result<($storage, Shape)> {
            let (storage, layout) = self.result.storage_and_layout();
            match storage.try_clone(layout)? {
                Storage::$variant(storage) => Ok((storage, layout.shape().clone())),
                other => {
                    let (lhs, rhs) = (self.result.device().location(), other.device().location());
                    let op = "label-smoothing-loss";
                    Err(candle_core::Error::DeviceMismatchBinaryOp { lhs, rhs, op }.bt())
                }
            }
        }
    };
}

impl<F> CustomOp3 for Node<F>
where
    F: Fn([&Tensor; 3], &Tensor) -> candle_core::Result<[Option<Tensor>; 3]>,
{
    fn name(&self) -> &'static str {
        "label-smoothing-loss"
    }

    each_backend!(hand_over);

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = (self.gradients)([a, b, c], gradient)?;
        Ok((a, b, c))
    }
}

// ---- Smoothed targets

/// Labels in, f32 distributions out.
pub(crate) struct Smooth {
    pub problem: Problem,
}

macro_rules! smooth {
    ($method:ident, $storage:ident, $variant:ident, $backend:ident) => {
        fn $method(
            &self,
            labels: &$storage,
            layout: &Layout,
        ) -> candle_core::Result<($storage, Shape)> {
            let Problem { class_dim, num_classes, .. } = self.problem;
            let mut shape = layout.dims().to_vec();
            shape.truncate(class_dim);
            shape.push(num_classes);
            Ok(($backend::smooth(&self.problem, (labels, layout))?, shape.into()))
        }
    };
}

impl CustomOp1 for Smooth {
    fn name(&self) -> &'static str {
        "smooth-targets"
    }

    each_backend!(smooth);
}
