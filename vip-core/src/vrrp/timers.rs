//! The arithmetic of VRRP's timers (RFC 9568 section 6.1), in nanoseconds: at an interval of a centisecond the skew of
//! two neighbouring priorities differs by 39 microseconds, and none of that may be rounded away.

use std::time::Duration;

/// The unit of the interval on the wire.
pub const CENTISECOND: Duration = Duration::from_millis(10);
/// The longest interval that the wire's 12 bits hold, in centiseconds.
pub const MAX_CENTISECONDS: u16 = 0xfff;

/// Skew time: how much longer a router of lower priority waits before it takes over.
pub fn skew(priority: u8, interval: Duration) -> Duration {
    interval * (256 - u32::from(priority)) / 256
}

/// Active down interval: the silence after which the master is taken for dead.
pub fn down(priority: u8, interval: Duration) -> Duration {
    interval * 3 + skew(priority, interval)
}

/// An interval as it goes on the wire: at least one centisecond, at most 4095.
pub fn to_centiseconds(interval: Duration) -> u16 {
    let count = interval.as_nanos() / CENTISECOND.as_nanos();
    u16::try_from(count).unwrap_or(u16::MAX).clamp(1, MAX_CENTISECONDS)
}

/// An interval as it came from the wire.
pub fn from_centiseconds(count: u16) -> Duration {
    CENTISECOND * u32::from(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skew_and_down() {
        let second = Duration::from_secs(1);
        assert_eq!(skew(100, second), Duration::from_nanos(609_375_000));
        assert_eq!(down(100, second), Duration::from_nanos(3_609_375_000));
        assert_eq!(down(100, second * 3), Duration::from_nanos(10_828_125_000));
        assert_eq!(down(100, CENTISECOND * 10), Duration::from_nanos(360_937_500));
        assert_eq!(skew(254, CENTISECOND), Duration::from_nanos(78_125));
        assert!(skew(255, CENTISECOND) > Duration::ZERO);
    }

    #[test]
    fn centiseconds() {
        assert_eq!(to_centiseconds(Duration::from_millis(100)), 10);
        assert_eq!(to_centiseconds(Duration::ZERO), 1);
        assert_eq!(to_centiseconds(Duration::from_secs(3600)), 4095);
        assert_eq!(from_centiseconds(4095), Duration::from_millis(40_950));
    }
}
