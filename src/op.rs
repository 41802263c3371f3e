//! The autograd node, and the way from candle's tensors to a backend.
//!
//! The loss is computed first, by kernels that know nothing of a graph, and then handed to the
//! graph as the result of one node whose backward asks the backend for the gradient.

use crate::backend::{Problem, cpu, row_shape};
use crate::error::Result;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape, Storage, Tensor};
use std::sync::OnceLock;

/// What the forward kernel gives, each of it a number a row.
pub(crate) struct RowLosses {
    /// The losses, in the logits' shape without the class dimension.
    pub losses: Tensor,
    /// The rows' class weights, 0 for ignored rows.
    pub weights: Option<Tensor>,
    /// What backward needs again, (3, N): the logits' maximum, Σ exp(x − maximum), and S.
    pub statistics: Option<Tensor>,
}

/// Runs the forward kernel. `weights` and `statistics` are made only where they are asked for.
pub(crate) fn row_losses(
    problem: &Problem,
    logits: &Tensor,
    targets: &Tensor,
    weights: bool,
    statistics: bool,
) -> Result<RowLosses> {
    let forward = Forward {
        problem,
        weights: weights.then(OnceLock::new),
        statistics: statistics.then(OnceLock::new),
    };
    let losses = logits.apply_op2_no_bwd(targets, &forward)?;
    Ok(RowLosses {
        losses,
        weights: forward.weights.and_then(OnceLock::into_inner),
        statistics: forward.statistics.and_then(OnceLock::into_inner),
    })
}

/// The forward kernel as an op of candle's, which picks the backend and lends the storages.
struct Forward<'a> {
    problem: &'a Problem,
    weights: Option<OnceLock<Tensor>>,
    statistics: Option<OnceLock<Tensor>>,
}

impl CustomOp2 for Forward<'_> {
    fn name(&self) -> &'static str {
        "label-smoothing-loss"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        logits_layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = cpu::forward(
            self.problem,
            (logits, logits_layout),
            (targets, targets_layout),
            self.weights.is_some(),
            self.statistics.is_some(),
        )?;
        let shape = row_shape(logits_layout.dims(), self.problem.class_dim);
        let rows = shape.iter().product::<usize>();
        if let (Some(cell), Some(weights)) = (&self.weights, out.weights) {
            cell.get_or_init(|| constant(Storage::Cpu(weights), rows));
        }
        if let (Some(cell), Some(statistics)) = (&self.statistics, out.statistics) {
            cell.get_or_init(|| constant(Storage::Cpu(statistics), (3, rows)));
        }
        Ok((out.losses, shape.into()))
    }
}

fn constant(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
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

impl Divisor {
    /// `tensor` / self, in the tensor's dtype.
    pub fn divide(&self, tensor: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Number(number) => tensor / *number,
            Self::Tensor(divisor) => {
                tensor.to_dtype(divisor.dtype())?.div(divisor)?.to_dtype(tensor.dtype())
            }
        }
    }
}

/// The node of the graph. Its forward hands over the result that was computed before.
pub(crate) struct Loss {
    pub problem: Problem,
    pub targets: Tensor,
    pub statistics: Tensor,
    pub reduced: Reduced,
}

impl CustomOp2 for Loss {
    fn name(&self) -> &'static str {
        "label-smoothing-loss"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        result: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        // One number, or one a row.
        Ok((result.clone(), layout.shape().clone()))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let upstream = match &self.reduced {
            Reduced::No => gradient.clone(),
            Reduced::By(divisor) => {
                let rows = row_shape(logits.dims(), self.problem.class_dim);
                divisor.divide(gradient)?.broadcast_as(rows)?
            }
        };
        let Self { problem, statistics, targets, .. } = self;
        let gradient = gradient_of(problem, statistics, logits, targets, &upstream)?;
        Ok((Some(gradient), None))
    }
}

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

/// The backward kernel: logits, targets and the rows' upstream gradients in, the gradient out.
struct Backward<'a> {
    problem: &'a Problem,
    statistics: &'a Tensor,
}

impl CustomOp3 for Backward<'_> {
    fn name(&self) -> &'static str {
        "label-smoothing-loss-backward"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        logits_layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
        upstream: &CpuStorage,
        upstream_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let gradient = cpu::backward(
            self.problem,
            (logits, logits_layout),
            (targets, targets_layout),
            (upstream, upstream_layout),
            self.statistics,
        )?;
        Ok((gradient, logits_layout.shape().clone()))
    }
}

/// Smoothed targets: labels in, f32 distributions out.
pub(crate) struct Smooth {
    pub problem: Problem,
}

impl CustomOp1 for Smooth {
    fn name(&self) -> &'static str {
        "smooth-targets"
    }

    fn cpu_fwd(
        &self,
        labels: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut shape = layout.dims().to_vec();
        shape.truncate(self.problem.class_dim);
        shape.push(self.problem.num_classes);
        let soft = cpu::smooth(&self.problem, (labels, layout))?;
        Ok((soft, shape.into()))
    }
}
