//! The chain of an audit log (hazard S24): each entry's hash is over its place, its time, its
//! words and the hash before it, so that whoever keeps one hash outside can tell whether
//! anything before it was changed, left out, put in, put elsewhere, or comes from another
//! company's.

use serde_json::Value;

use super::digest::sha256;
use super::ids::CompanyId;

/// What the first entry follows.
pub const GENESIS: [u8; 32] = [0; 32];

/// Something to be written down.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What happened, dotted.
    pub kind: &'static str,
    /// Who did it: a key, an agent, or `system`.
    pub actor: String,
    /// What it was about.
    pub data: Value,
}

impl Entry {
    /// An entry.
    pub fn new(kind: &'static str, actor: impl Into<String>, data: Value) -> Self {
        Self { kind, actor: actor.into(), data }
    }
}

/// An entry in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its place, from 1.
    pub seq: i64,
    /// When, in microseconds since 1970.
    pub at_us: i64,
    /// What happened.
    pub kind: String,
    /// Who did it.
    pub actor: String,
    /// What it was about, as JSON, byte for byte.
    pub data: String,
    /// The hash before.
    pub prev: Vec<u8>,
    /// Its own.
    pub hash: Vec<u8>,
}

/// Puts an entry behind another.
pub fn chain(company: CompanyId, prev: &[u8], seq: i64, at_us: i64, entry: &Entry) -> Link {
    let mut link = Link {
        seq,
        at_us,
        kind: entry.kind.to_owned(),
        actor: entry.actor.clone(),
        data: entry.data.to_string(),
        prev: prev.to_vec(),
        hash: Vec::new(),
    };
    link.hash = hash(company, &link);
    link
}

/// Each part with its length before it, so that none can be moved into another.
fn hash(company: CompanyId, link: &Link) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(link.data.len() + 256);
    let (seq, at) = (link.seq.to_be_bytes(), link.at_us.to_be_bytes());
    let company = company.to_string();
    let parts: [&[u8]; 7] =
        [&link.prev, company.as_bytes(), &seq, &at, link.kind.as_bytes(), link.actor.as_bytes(), link.data.as_bytes()];
    for part in parts {
        bytes.extend(u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        bytes.extend(part);
    }
    sha256(&bytes).to_vec()
}

/// Follows a chain entry by entry.
#[derive(Debug)]
pub struct Walk {
    company: CompanyId,
    seq: i64,
    hash: Vec<u8>,
}

impl Walk {
    /// From its beginning.
    pub fn new(company: CompanyId) -> Self {
        Self { company, seq: 0, hash: GENESIS.to_vec() }
    }

    /// The last entry that was followed.
    pub fn seq(&self) -> i64 {
        self.seq
    }

    /// Its hash.
    pub fn hash(&self) -> &[u8] {
        &self.hash
    }

    /// Goes one entry on, or says what is wrong with it.
    pub fn follow(&mut self, link: &Link) -> Result<(), String> {
        if link.seq != self.seq + 1 {
            return Err(format!("entry {} is missing: {} follows {}", self.seq + 1, link.seq, self.seq));
        }
        if link.prev != self.hash {
            return Err(format!("entry {} does not follow the one before it", link.seq));
        }
        if hash(self.company, link) != link.hash {
            return Err(format!("entry {} is not what was written", link.seq));
        }
        self.seq = link.seq;
        self.hash.clone_from(&link.hash);
        Ok(())
    }

    /// Whether the chain ends where it should.
    pub fn ends_at(&self, seq: i64, hash: &[u8]) -> Result<(), String> {
        match (self.seq == seq, self.hash == hash) {
            (true, true) => Ok(()),
            (false, _) => {
                Err(format!("the chain ends with entry {}, and should with {seq}: its tail was cut", self.seq))
            }
            (true, false) => Err(format!("entry {seq} has another hash than the head: the chain was written anew")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use uuid::Uuid;

    fn company(n: u128) -> CompanyId {
        CompanyId(Uuid::from_u128(n))
    }

    fn links(company: CompanyId, count: i64) -> Vec<Link> {
        let mut prev = GENESIS.to_vec();
        (1..=count)
            .map(|seq| {
                let link = chain(company, &prev, seq, seq * 1_000, &Entry::new("x", "key_1", json!({"n": seq})));
                prev.clone_from(&link.hash);
                link
            })
            .collect()
    }

    fn follows(of: CompanyId, links: &[Link]) -> Result<Walk, String> {
        let mut walk = Walk::new(of);
        links.iter().try_for_each(|link| walk.follow(link)).map(|()| walk)
    }

    #[test]
    fn a_whole_chain_is_followed_to_its_head() {
        let all = links(company(1), 5);
        let walk = follows(company(1), &all).expect("whole");
        assert_eq!(walk.ends_at(5, &all[4].hash), Ok(()));
        assert!(follows(company(1), &all[..4]).expect("whole").ends_at(5, &all[4].hash).is_err(), "a cut tail");
        assert!(follows(company(2), &all).is_err(), "another company's");
    }

    proptest! {
        #[test]
        fn whatever_is_changed_is_found(at in 0usize..5, how in 0u8..6) {
            let mut all = links(company(1), 5);
            match how {
                0 => all[at].data = json!({"n": 99}).to_string(),
                1 => all[at].actor = "somebody".into(),
                2 => all[at].at_us += 1,
                3 => { all.remove(at); }
                4 => all.swap(at, (at + 1) % 5),
                _ => all[at] = links(company(2), 5)[at].clone(),
            }
            let head = links(company(1), 5)[4].hash.clone();
            prop_assert!(follows(company(1), &all).and_then(|walk| walk.ends_at(5, &head)).is_err());
        }
    }
}
