//! What the bytes of an input mean: shapes, numbers, views and options, mostly such that they fit together.

use arbitrary::Arbitrary;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, Var};
use half::f16;

pub const DTYPES: [DType; 11] = [
    DType::F32,
    DType::F64,
    DType::BF16,
    DType::F16,
    DType::U32,
    DType::I64,
    DType::U8,
    DType::I32,
    DType::I16,
    DType::F8E4M3,
    DType::F8E8M0,
];

/// No dimension is longer where there is memory for every element.
pub const LONGEST: usize = 1 << 17;

/// A dimension: mostly short, now and then around the sizes that the kernels work by, or beyond memory.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Len(u8);

impl Len {
    pub fn get(self) -> usize {
        const LONG: [usize; 14] =
            [127, 128, 129, 255, 256, 257, 300, 513, 1000, 4097, 16_384, 16_385, 40_000, 70_001];
        const BEYOND: [usize; 6] = [1 << 25, 1 << 31, 1 << 45, 1 << 59, 1 << 62, usize::MAX];
        let len = usize::from(self.0);
        match len {
            0..200 => len % 7,
            200..236 => len - 192,
            236..250 => LONG[len - 236],
            _ => BEYOND[len - 250],
        }
    }
}

/// A shape of up to five dimensions.
#[derive(Arbitrary, Debug)]
pub struct Dims {
    rank: u8,
    lens: [Len; 5],
}

impl Dims {
    pub fn get(&self) -> Vec<usize> {
        let rank = usize::from(self.rank) % 6;
        self.lens[..rank].iter().map(|len| len.get()).collect()
    }
}

/// Numbers without end: those that the bytes hold, again and again, from another place each time.
#[derive(Arbitrary, Debug)]
pub enum Numbers<'a> {
    /// From −8 to 8.
    Small(&'a [u8]),
    /// The bits of f16, NaN and infinity among them.
    Halves(&'a [u8]),
    /// The bits of f64.
    Doubles(&'a [u8]),
}

impl Numbers<'_> {
    pub fn float(&self, i: usize) -> f64 {
        match self {
            Self::Small(bytes) => f64::from(i8::from_le_bytes(at(bytes, i))) / 16.,
            Self::Halves(bytes) => f16::from_le_bytes(at(bytes, i)).to_f64(),
            Self::Doubles(bytes) => f64::from_le_bytes(at(bytes, i)),
        }
    }

    /// A class, or anything.
    fn label(&self, i: usize, num_classes: usize) -> i64 {
        match self {
            Self::Small(bytes) => {
                let [byte] = at(bytes, i);
                (u64::from(byte) * 0x0101_0101 % num_classes.max(1) as u64).cast_signed()
            }
            Self::Halves(bytes) => i16::from_le_bytes(at(bytes, i)).into(),
            Self::Doubles(bytes) => i64::from_le_bytes(at(bytes, i)),
        }
    }

    /// A tensor of these floats, contiguous.
    pub fn floats(&self, dims: &[usize], dtype: DType) -> Result<Tensor> {
        let floats = (0..dims.iter().product()).map(|i| self.float(i)).collect();
        cast(Tensor::from_vec::<_, f64>(floats, dims, &Device::Cpu)?, dtype)
    }
}

fn at<const N: usize>(bytes: &[u8], i: usize) -> [u8; N] {
    let len = (bytes.len() / N).max(1);
    let i = (i + i / len) % len * N;
    std::array::from_fn(|j| bytes.get(i + j).copied().unwrap_or(0))
}

/// Like `to_dtype`, which lacks some ways.
fn cast(tensor: Tensor, dtype: DType) -> Result<Tensor> {
    match dtype {
        DType::F8E4M3 => tensor.to_dtype(DType::F32)?.to_dtype(dtype),
        DType::F8E8M0 => {
            let storage = CpuStorage::F8E8M0(vec![0; tensor.elem_count()]);
            let none = BackpropOp::none();
            Ok(Tensor::from_storage(Storage::Cpu(storage), tensor.shape(), none, false))
        }
        _ => tensor.to_dtype(dtype),
    }
}

/// How a tensor lies in a larger storage, or a smaller one.
#[derive(Arbitrary, Debug)]
pub struct View {
    /// Rotates the dimensions; or the storage is too short, as only `Tensor::from_storage` makes it.
    order: u8,
    /// Leaves out what comes before and after in one dimension.
    narrowed: u8,
    margins: [u8; 2],
    /// The dimensions that are broadcast, a bit each. Those that are beyond memory always are.
    broadcast: u8,
}

/// A tensor to be made.
#[derive(Arbitrary, Debug)]
pub struct Given<'a> {
    pub dtype: u8,
    pub is_tracked: bool,
    numbers: Numbers<'a>,
    view: View,
}

/// A tensor, and whose view it is.
pub struct Made {
    pub base: Tensor,
    pub view: Tensor,
    /// Whether it reaches beyond its storage.
    pub is_short: bool,
}

impl Made {
    /// A tensor of the same shape whose storage lacks the last element.
    fn shortened(self) -> Self {
        macro_rules! shortened {
            ($storage:expr, $len:expr, $($dtype:ident)*) => {
                match $storage {
                    $(CpuStorage::$dtype(values) => {
                        CpuStorage::$dtype(values.iter().copied().cycle().take($len).collect())
                    })*
                }
            };
        }
        let view = {
            let (storage, layout) = self.view.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else { unreachable!("it was made there") };
            let storage = shortened!(
                storage, layout.shape().elem_count() - 1,
                U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3 F6E2M3 F6E3M2 F4 F8E8M0
            );
            let none = BackpropOp::none();
            Tensor::from_storage(Storage::Cpu(storage), layout.shape(), none, false)
        };
        Self { base: view.clone(), view, is_short: true }
    }
}

impl Given<'_> {
    /// Mostly one of the first so many.
    pub fn dtype(&self, usual: usize) -> DType {
        let at = usize::from(self.dtype);
        DTYPES[if at < 220 { at % usual } else { at % DTYPES.len() }]
    }

    /// Nothing if it would take too long.
    pub fn floats(&self, dims: &[usize], dtype: DType) -> Result<Option<Made>> {
        self.make(dims, |dims| self.numbers.floats(dims, dtype))
    }

    pub fn labels(&self, dims: &[usize], dtype: DType, classes: usize) -> Result<Option<Made>> {
        self.make(dims, |dims| {
            let labels = (0..dims.iter().product()).map(|i| self.numbers.label(i, classes));
            cast(Tensor::from_vec::<_, i64>(labels.collect(), dims, &Device::Cpu)?, dtype)
        })
    }

    fn make(
        &self,
        dims: &[usize],
        base: impl Fn(&[usize]) -> Result<Tensor>,
    ) -> Result<Option<Made>> {
        let rank = dims.len();
        let View { order, narrowed, margins, broadcast } = self.view;
        let stored = |(dim, &len)| {
            if len > LONGEST || broadcast >> dim & 1 == 1 { 1 } else { len }
        };
        let stored: Vec<usize> = dims.iter().enumerate().map(stored).collect();
        let mut order: Vec<usize> =
            (0..rank).map(|dim| (dim + usize::from(order)) % rank.max(1)).collect();
        if narrowed >= 128 {
            order.reverse();
        }
        let mut base_dims = vec![0; rank];
        order.iter().zip(&stored).for_each(|(&from, &len)| base_dims[from] = len);
        let narrowed = usize::from(narrowed) % rank.max(1);
        let [before, after] = margins.map(|margin| usize::from(margin % 4));
        let len = base_dims.get(narrowed).copied();
        if let Some(len) = base_dims.get_mut(narrowed) {
            *len += before + after;
        }
        let size = base_dims.iter().try_fold(1usize, |size, &len| size.checked_mul(len));
        if size.is_none_or(|size| size > 2 * LONGEST) {
            return Ok(None);
        }
        let mut base = base(&base_dims)?;
        if self.is_tracked && base.dtype() != DType::F8E8M0 {
            base = Var::from_tensor(&base)?.into_inner();
        }
        let mut view = base.clone();
        if let Some(len) = len {
            view = view.narrow(narrowed, before, len)?.permute(order)?;
        }
        if view.dims() != dims {
            view = view.broadcast_as(dims)?;
        }
        let made = Made { base, view, is_short: false };
        let len = dims.iter().try_fold(1usize, |len, dim| len.checked_mul(*dim));
        let can_be_short = len.is_some_and(|len| (1..=LONGEST).contains(&len));
        Ok(Some(if can_be_short && self.view.order > 250 { made.shortened() } else { made }))
    }
}

/// A proportion or a coefficient.
#[derive(Arbitrary, Debug)]
pub enum Number {
    Fraction(u8),
    Any(f64),
}

impl Number {
    pub fn get(&self) -> f64 {
        match self {
            Self::Fraction(byte) => f64::from(byte % 33) / 32.,
            Self::Any(number) => *number,
        }
    }
}

/// Class weights or a prior.
#[derive(Arbitrary, Debug)]
pub struct Vector<'a> {
    misfit: Misfit,
    len: Len,
    given: Given<'a>,
}

impl Vector<'_> {
    /// Mostly such as they should be.
    pub fn make(&self, num_classes: usize, is_prior: bool) -> Result<Option<Made>> {
        let fits = matches!(self.given.numbers, Numbers::Small(_));
        let len = if self.misfit.get().is_some() { self.len.get() } else { num_classes };
        let dims: &[usize] = if self.misfit.get() == Some(0) { &[len, 1] } else { &[len] };
        let dtype = self.given.dtype(4);
        self.given.make(dims, |dims| {
            let floats = self.given.numbers.floats(dims, DType::F64)?;
            let floats = if fits { floats.abs()? } else { floats };
            let sum = floats.sum_all()?;
            let is_prior = is_prior && fits && sum.to_scalar::<f64>()? > 0.;
            cast(if is_prior { floats.broadcast_div(&sum)? } else { floats }, dtype)
        })
    }
}

/// Mostly nothing; otherwise what is wrong, a number below 8.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Misfit(u8);

impl Misfit {
    pub fn get(self) -> Option<u8> {
        self.0.checked_sub(248)
    }
}

#[derive(Arbitrary, Debug)]
pub enum Convention<'a> {
    None,
    All(Number),
    Others(Number),
    Toward(Number, Vector<'a>),
}

#[derive(Arbitrary, Debug)]
pub enum Index {
    Small(i8),
    Any(i64),
}

impl Index {
    pub fn get(&self) -> i64 {
        match self {
            Self::Small(index) => i64::from(*index),
            Self::Any(index) => *index,
        }
    }
}

#[derive(Arbitrary, Debug)]
pub struct Options<'a> {
    pub convention: Convention<'a>,
    pub reduction: u8,
    pub class_weights: Option<Vector<'a>>,
    pub ignore_index: Option<Index>,
    pub class_dim: Option<u8>,
    pub z_loss: Option<Number>,
}

/// What is called.
#[derive(Arbitrary, Debug)]
pub enum Call<'a> {
    Forward {
        logits: Given<'a>,
    },
    Linear {
        size: Len,
        hidden: Given<'a>,
        weight: Given<'a>,
        bias: Option<Given<'a>>,
        tile: Option<[u8; 2]>,
        misfit: Misfit,
    },
    SmoothTargets {
        num_classes: Option<Len>,
    },
    CheckTargets {
        num_classes: Option<Len>,
    },
}

#[derive(Arbitrary, Debug)]
pub struct Input<'a> {
    pub call: Call<'a>,
    /// Those of the logits.
    pub dims: Dims,
    pub options: Options<'a>,
    pub targets: Given<'a>,
    pub targets_misfit: Misfit,
    pub upstream: Numbers<'a>,
}
