//! Failed attempts to authenticate, by address: whoever guesses keys is soon
//! refused without a look into the database. Bounded, and this process's own.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::meter::Standing;

/// Failures that an address has at once, and that it gets back in a minute, where
/// the operator says nothing else.
pub const FAILURES_MAX: u32 = 30;
/// Addresses that are remembered, in each of two generations.
const ADDRESSES_MAX: usize = 10_000;

/// The buckets: those that failed lately, and those before them, who are
/// forgotten when there are too many.
#[derive(Debug)]
pub struct Strangers {
    failures_max: u32,
    young: HashMap<IpAddr, (f64, Instant)>,
    old: HashMap<IpAddr, (f64, Instant)>,
}

/// One customer has a whole IPv6 network: /64 is the smallest that is given out.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let bits = u128::from(v6) & !u128::from(u64::MAX);
            IpAddr::V6(bits.into())
        }
        v4 => v4,
    }
}

impl Strangers {
    /// None yet, of whom each may fail so often a minute.
    pub fn new(failures_max: u32) -> Self {
        Self { failures_max: failures_max.max(1), young: HashMap::new(), old: HashMap::new() }
    }

    fn used(&self, address: IpAddr, now: Instant) -> f64 {
        let address = network(address);
        self.young.get(&address).or_else(|| self.old.get(&address)).map_or(0.0, |(used, at)| {
            let regained = now.saturating_duration_since(*at).as_secs_f64() * f64::from(self.failures_max) / 60.0;
            (used - regained).max(0.0)
        })
    }

    /// How long an address has to wait before it may fail again, if it has to.
    pub fn refused(&self, address: IpAddr, now: Instant) -> Option<Duration> {
        let over = self.used(address, now) - f64::from(self.failures_max - 1);
        (over > 0.0).then(|| Duration::from_secs_f64(over * 60.0 / f64::from(self.failures_max)))
    }

    /// An attempt has failed.
    pub fn failed(&mut self, address: IpAddr, now: Instant) {
        let used = self.used(address, now) + 1.0;
        if self.young.len() >= ADDRESSES_MAX {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(network(address), (used, now));
    }

    /// As headers tell it to whoever shows no key.
    pub fn standing(&self, address: IpAddr, now: Instant) -> Standing {
        let used = self.used(address, now);
        let left = (f64::from(self.failures_max) - used).max(0.0).floor();
        let reset = (used * 60.0 / f64::from(self.failures_max)).ceil();
        Standing { limit: self.failures_max, remaining: left as u32, reset: reset as u32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_fails_too_often_waits_and_others_do_not() {
        let mut strangers = Strangers::new(FAILURES_MAX);
        let now = Instant::now();
        let (bad, good): (IpAddr, IpAddr) =
            ("2001:db8::1".parse().expect("an address"), "127.0.0.1".parse().expect("one"));
        for _ in 0..FAILURES_MAX {
            assert_eq!(strangers.refused(bad, now), None);
            strangers.failed(bad, now);
        }
        assert!(strangers.refused(bad, now).is_some());
        // Another address of the same network.
        assert!(strangers.refused("2001:db8::ffff".parse().expect("an address"), now).is_some());
        assert_eq!(strangers.refused(good, now), None);
        assert_eq!(strangers.standing(bad, now).remaining, 0);
        assert_eq!(strangers.refused(bad, now + Duration::from_secs(3)), None);
    }

    #[test]
    fn a_flood_of_addresses_takes_no_more_than_its_place() {
        let mut strangers = Strangers::new(FAILURES_MAX);
        let now = Instant::now();
        for n in 0..30_000_u32 {
            strangers.failed(IpAddr::V4(n.into()), now);
        }
        assert!(strangers.young.len() + strangers.old.len() <= 2 * ADDRESSES_MAX);
        assert!(strangers.used(IpAddr::V4(29_999.into()), now) > 0.0);
    }
}
