//! The dtypes: what logits are stored in, and what the arithmetic runs in.

use candle_core::WithDType;
use half::{bf16, f16};

/// A dtype of logits.
pub(super) trait Element: WithDType {
    const ZERO: Self;
    /// The dtype of the arithmetic.
    type Real: Real;
    fn from_real(value: Self::Real) -> Self;
}

macro_rules! element {
    ($element:ident, $real:ident, $zero:expr, $from_real:expr) => {
        impl Element for $element {
            const ZERO: Self = $zero;
            type Real = $real;

            fn from_real(value: $real) -> Self {
                $from_real(value)
            }
        }
    };
}

element!(bf16, f32, bf16::ZERO, bf16::from_f32);
element!(f16, f32, f16::ZERO, f16::from_f32);
element!(f32, f32, 0., std::convert::identity);
element!(f64, f64, 0., std::convert::identity);

/// A dtype of the arithmetic.
pub(super) trait Real: Element<Real = Self> {
    const NEG_INFINITY: Self;
    fn from_f32(value: f32) -> Self;
    fn exp(self) -> Self;
    /// The larger of the two, or the one that is not NaN.
    fn maximum(self, other: Self) -> Self;
}

macro_rules! real {
    ($real:ident) => {
        impl Real for $real {
            const NEG_INFINITY: Self = $real::NEG_INFINITY;

            fn from_f32(value: f32) -> Self {
                value.into()
            }

            fn exp(self) -> Self {
                $real::exp(self)
            }

            fn maximum(self, other: Self) -> Self {
                $real::max(self, other)
            }
        }
    };
}

real!(f32);
real!(f64);
