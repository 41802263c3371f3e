//! The autograd node, and the way from candle's tensors to a backend.
//!
//! The loss is computed first, by kernels that know nothing of a graph, and then handed to the
//! graph as the result of one node whose backward asks the backend for the gradient.

#[cfg(feature = "cuda")]
use crate::backend::cuda;
#[cfg(feature = "metal")]
use crate::backend::metal;
use crate::backend::{self, Problem, Reduce, host, row_shape};
use crate::error::Result;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
#[cfg(feature = "metal")]
use candle_core::MetalStorage;
use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape, Storage, Tensor};
use std::sync::OnceLock;

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
    let op = Forward { problem, reduce, wants_statistics: statistics, others: OnceLock::new() };
    let result = logits.apply_op2_no_bwd(targets, &op)?;
    let (divisor, statistics) = op.others.into_inner().unwrap_or_default();
    let reduced = match (reduce, divisor) {
        (Reduce::DividedBy(number), _) => Reduced::By(Divisor::Number(number)),
        (_, Some(divisor)) => Reduced::By(Divisor::Tensor(divisor)),
        (_, None) => Reduced::No,
    };
    Ok(Losses { result, reduced, statistics })
}

/// The forward kernel as an op of candle's, which picks the backend and lends the storages.
struct Forward<'a> {
    problem: &'a Problem,
    reduce: Reduce,
    wants_statistics: bool,
    /// What there is besides the result: the divisor and the statistics.
    others: OnceLock<(Option<Tensor>, Option<Tensor>)>,
}

impl Forward<'_> {
    fn keep<S>(
        &self,
        out: backend::Forward<S>,
        logits: &Layout,
        storage: fn(S) -> Storage,
    ) -> (S, Shape) {
        let rows = row_shape(logits.dims(), self.problem.class_dim);
        let num_rows = rows.iter().product::<usize>();
        let constant = |numbers: S, shape: Shape| {
            Tensor::from_storage(storage(numbers), shape, BackpropOp::none(), false)
        };
        self.others.get_or_init(|| {
            let divisor = out.divisor.map(|divisor| constant(divisor, ().into()));
            let statistics = out.statistics.map(|saved| constant(saved, (3, num_rows).into()));
            (divisor, statistics)
        });
        let shape = match self.reduce {
            Reduce::No => rows.into(),
            Reduce::DividedBy(_) | Reduce::DividedByWeights => ().into(),
        };
        (out.result, shape)
    }
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
        let (logits, targets) = ((logits, logits_layout), (targets, targets_layout));
        let Self { problem, reduce, wants_statistics, .. } = self;
        let out = host::forward(problem, logits, targets, *reduce, *wants_statistics)?;
        Ok(self.keep(out, logits_layout, Storage::Cpu))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        logits: &CudaStorage,
        logits_layout: &Layout,
        targets: &CudaStorage,
        targets_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let (logits, targets) = ((logits, logits_layout), (targets, targets_layout));
        let Self { problem, reduce, wants_statistics, .. } = self;
        let out = cuda::forward(problem, logits, targets, *reduce, *wants_statistics)?;
        Ok(self.keep(out, logits_layout, Storage::Cuda))
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        logits: &MetalStorage,
        logits_layout: &Layout,
        targets: &MetalStorage,
        targets_layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        let (logits, targets) = ((logits, logits_layout), (targets, targets_layout));
        let Self { problem, reduce, wants_statistics, .. } = self;
        let out = metal::forward(problem, logits, targets, *reduce, *wants_statistics)?;
        Ok(self.keep(out, logits_layout, Storage::Metal))
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

    // One number, or one a row.

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        result: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((result.try_clone(layout)?, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        result: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((result.try_clone(layout)?, layout.shape().clone()))
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        result: &MetalStorage,
        layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        Ok((result.try_clone(layout)?, layout.shape().clone()))
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
        let gradient = host::backward(
            self.problem,
            (logits, logits_layout),
            (targets, targets_layout),
            (upstream, upstream_layout),
            self.statistics,
        )?;
        Ok((gradient, logits_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        logits: &CudaStorage,
        logits_layout: &Layout,
        targets: &CudaStorage,
        targets_layout: &Layout,
        upstream: &CudaStorage,
        upstream_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let gradient = cuda::backward(
            self.problem,
            (logits, logits_layout),
            (targets, targets_layout),
            (upstream, upstream_layout),
            self.statistics,
        )?;
        Ok((gradient, logits_layout.shape().clone()))
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        logits: &MetalStorage,
        logits_layout: &Layout,
        targets: &MetalStorage,
        targets_layout: &Layout,
        upstream: &MetalStorage,
        upstream_layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        let gradient = metal::backward(
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

impl Smooth {
    fn shape(&self, labels: &Layout) -> Shape {
        let mut shape = labels.dims().to_vec();
        shape.truncate(self.problem.class_dim);
        shape.push(self.problem.num_classes);
        shape.into()
    }
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
        Ok((host::smooth(&self.problem, (labels, layout))?, self.shape(layout)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        labels: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((cuda::smooth(&self.problem, (labels, layout))?, self.shape(layout)))
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        labels: &MetalStorage,
        layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        Ok((metal::smooth(&self.problem, (labels, layout))?, self.shape(layout)))
    }
}
