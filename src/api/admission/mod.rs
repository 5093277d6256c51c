//! Who may come in: keys, the limits of their accounts over all API processes,
//! and credits, for at most one round trip a request and mostly none.
//!
//! A process takes from an account's limits what it will hand out next (a grant)
//! and gives back, a moment later, what it did not use, together with the
//! credits that were. A process that dies takes its grant along: the client has
//! less for a moment, and was charged for all but its last calls.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use capx_core::domain::ids::AccountId;
use capx_core::domain::key::ApiKey;
use capx_core::store::StoreError;
use capx_core::store::grants::{self, Ask, Given, KeyRow};
use sqlx::PgPool;
use uuid::Uuid;

pub mod meter;
mod strangers;

use meter::{Meter, Refusal, Standing};
use strangers::Strangers;

pub use strangers::FAILURES_MAX;

/// How long a key is believed without another look: with the look's own time,
/// a revoked one is refused everywhere within 5 s.
const KEY_BELIEVED: Duration = Duration::from_secs(2);
/// Keys that are remembered; more are looked up each time.
const KEYS_MAX: usize = 50_000;
/// Between two settlements of what is not in use.
const SETTLEMENT: Duration = Duration::from_millis(100);
/// Accounts of one settlement.
const SETTLED_MAX: usize = 1_000;

type Hash = [u8; 32];

/// The limits of this process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Admission(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    pool: PgPool,
    /// Who holds what: each process by its own name.
    process: Uuid,
    keys: Mutex<HashMap<Hash, (Arc<KeyRow>, Instant)>>,
    accounts: Mutex<HashMap<AccountId, Arc<Account>>>,
    strangers: Mutex<Strangers>,
}

#[derive(Debug)]
struct Account {
    id: AccountId,
    meter: Mutex<Meter>,
    /// One question at a time.
    asking: tokio::sync::Mutex<()>,
}

/// A request that was let in, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    /// By which key.
    pub key: Arc<KeyRow>,
    hash: Hash,
    account: Arc<Account>,
}

/// Why a request was not let in.
#[derive(Debug)]
pub enum Barred {
    /// The key is not good, or there is none.
    Key,
    /// Its address has failed too often.
    Stranger(Duration),
    /// A limit of its account.
    Limit(Refusal, Standing),
    /// The database.
    Store(StoreError),
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Admission {
    /// One that nobody enters by: of a process that serves its health only.
    pub fn shut(pool: PgPool) -> Self {
        Self(Arc::new(Shared::new(pool, FAILURES_MAX)))
    }

    /// Over a pool of its own, of [`capx_core::store::PoolKind::Meter`].
    /// `failures_max` is how often a minute an address may fail to authenticate.
    pub fn start(pool: PgPool, failures_max: u32) -> Self {
        let shared = Arc::new(Shared::new(pool, failures_max));
        let weak = Arc::downgrade(&shared);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SETTLEMENT).await;
                let Some(shared) = weak.upgrade() else { return };
                if let Err(error) = shared.settle().await {
                    tracing::debug!(%error, "limits and credits were not settled; they will be");
                }
            }
        });
        Self(shared)
    }

    /// Lets a request in, or says why not.
    pub async fn enter(&self, key: &ApiKey, from: IpAddr) -> Result<Permit, Barred> {
        let hash = key.hash();
        loop {
            let known = self.0.key(&hash);
            if let Some((row, true)) = &known
                && let Some(account) = self.0.account(row.account)
            {
                match self.0.enter(&account)? {
                    true => return Ok(Permit { key: Arc::clone(row), hash, account }),
                    false => self.0.ask(&hash, Some(&account)).await?,
                }
            } else {
                // A key that was good a moment ago is no guess.
                if known.is_none()
                    && let Some(wait) = locked(&self.0.strangers).refused(from, Instant::now())
                {
                    return Err(Barred::Stranger(wait));
                }
                let account = known.as_ref().and_then(|(row, _)| self.0.account(row.account));
                if let Err(barred) = self.0.ask(&hash, account.as_ref()).await {
                    if matches!(barred, Barred::Key) {
                        self.failed(from);
                    }
                    return Err(barred);
                }
            }
        }
    }

    /// An attempt to authenticate has failed.
    pub fn failed(&self, from: IpAddr) {
        locked(&self.0.strangers).failed(from, Instant::now());
    }

    /// How long an address that shows no good key has to wait, if it has to.
    pub fn stranger(&self, from: IpAddr) -> Option<Duration> {
        locked(&self.0.strangers).refused(from, Instant::now())
    }

    /// As headers tell it to whoever shows no key.
    pub fn stranger_standing(&self, from: IpAddr) -> Standing {
        locked(&self.0.strangers).standing(from, Instant::now())
    }

    /// Whether the key of a stream that is still open is still good.
    pub async fn is_good(&self, permit: &Permit) -> bool {
        if let Some((_, true)) = self.0.key(&permit.hash) {
            return true;
        }
        let _turn = permit.account.asking.lock().await;
        if let Some((_, true)) = self.0.key(&permit.hash) {
            return true;
        }
        let ask = locked(&permit.account.meter).ask_less();
        match self.0.ask_once(&permit.hash, Some(&permit.account), ask).await {
            Ok(_) => true,
            Err(Barred::Key) => false,
            // While the database is away nobody can revoke.
            Err(_) => true,
        }
    }
}

impl Permit {
    /// Charges credits; says what is left.
    pub fn charge(&self, credits: i64) -> i64 {
        locked(&self.account.meter).charge(if self.key.live { credits } else { 0 })
    }

    /// As headers tell it.
    pub fn standing(&self) -> Standing {
        locked(&self.account.meter).standing()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        locked(&self.account.meter).leave();
    }
}

impl Shared {
    fn new(pool: PgPool, failures_max: u32) -> Self {
        Self {
            pool,
            process: Uuid::now_v7(),
            keys: Mutex::default(),
            accounts: Mutex::default(),
            strangers: Mutex::new(Strangers::new(failures_max)),
        }
    }

    /// A key that is remembered, and whether it is still believed.
    fn key(&self, hash: &Hash) -> Option<(Arc<KeyRow>, bool)> {
        let keys = locked(&self.keys);
        keys.get(hash).map(|(row, at)| (Arc::clone(row), at.elapsed() < KEY_BELIEVED))
    }

    fn account(&self, account: AccountId) -> Option<Arc<Account>> {
        locked(&self.accounts).get(&account).cloned()
    }

    fn enter(&self, account: &Account) -> Result<bool, Barred> {
        let mut meter = locked(&account.meter);
        let now = Instant::now();
        meter.enter(now).map_err(|refusal| Barred::Limit(refusal, meter.standing()))
    }

    /// Asks for one more request; who waited for another's question looks first
    /// whether that has brought enough.
    async fn ask(&self, hash: &Hash, account: Option<&Arc<Account>>) -> Result<(), Barred> {
        let Some(known) = account else {
            let first = Ask { want: 1, slots: 1, ..Ask::default() };
            return self.ask_once(hash, None, first).await.map(drop);
        };
        let _turn = known.asking.lock().await;
        let believed = self.key(hash).is_some_and(|(_, believed)| believed);
        let ask = {
            let mut meter = locked(&known.meter);
            if let Some(refusal) = meter.refusal(Instant::now()) {
                return Err(Barred::Limit(refusal, meter.standing()));
            }
            if believed && meter.has_room(Instant::now()) {
                return Ok(());
            }
            meter.ask_more()
        };
        let slots = ask.slots;
        let given = self.ask_once(hash, Some(known), ask).await?;
        let mut meter = locked(&known.meter);
        // What this has brought, others may have taken since; then ask again.
        if given.granted > 0 && given.slots >= slots || meter.has_room(Instant::now()) {
            return Ok(());
        }
        let refusal = meter.refuse(Instant::now());
        Err(Barred::Limit(refusal, meter.standing()))
    }

    /// One question: the key, and what an account's meter wants.
    async fn ask_once(&self, hash: &Hash, account: Option<&Arc<Account>>, ask: Ask) -> Result<Given, Barred> {
        let asked = Ask { hash: Some(*hash), account: account.map(|account| account.id), ..ask };
        let answer = grants::take(&self.pool, self.process, std::slice::from_ref(&asked)).await;
        let given = match (answer, account) {
            (Ok(answer), _) => answer.into_iter().next().flatten(),
            (Err(error), None) => return Err(Barred::Store(error)),
            (Err(error), Some(account)) => {
                locked(&account.meter).unanswered();
                return Err(Barred::Store(error));
            }
        };
        let now = Instant::now();
        let Some((key, given)) = given.as_ref().and_then(|given| Some((given.key.clone()?, given.clone()))) else {
            locked(&self.keys).remove(hash);
            if let Some(account) = account {
                let mut meter = locked(&account.meter);
                // The key is not good any more; what its calls cost was charged.
                match &given {
                    Some(given) => meter.answered(given, now),
                    None => meter.unanswered(),
                }
            }
            return Err(Barred::Key);
        };
        let account = account.cloned().unwrap_or_else(|| {
            let (id, meter) = (key.account, Mutex::new(Meter::new(now)));
            let new = || Arc::new(Account { id, meter, asking: tokio::sync::Mutex::default() });
            Arc::clone(locked(&self.accounts).entry(id).or_insert_with(new))
        });
        locked(&account.meter).answered(&given, now);
        let mut keys = locked(&self.keys);
        if keys.len() >= KEYS_MAX {
            keys.retain(|_, (_, at)| at.elapsed() < KEY_BELIEVED);
        }
        if keys.len() < KEYS_MAX {
            keys.insert(*hash, (Arc::new(key), now));
        }
        Ok(given)
    }

    /// Gives back what is not in use, and charges what was.
    async fn settle(&self) -> Result<(), StoreError> {
        let accounts: Vec<(AccountId, Arc<Account>)> = {
            let mut accounts = locked(&self.accounts);
            // Whoever holds one besides this map may be about to use it.
            accounts.retain(|_, account| Arc::strong_count(account) > 1 || !locked(&account.meter).is_idle());
            let now = Instant::now();
            let unsettled = accounts.iter().filter(|(_, account)| locked(&account.meter).is_unsettled(now));
            unsettled.map(|(id, account)| (*id, Arc::clone(account))).take(SETTLED_MAX).collect()
        };
        // Those that are being asked for settle by the question.
        let turns: Vec<_> =
            accounts.iter().filter_map(|(id, account)| Some((*id, account, account.asking.try_lock().ok()?))).collect();
        if turns.is_empty() {
            return Ok(());
        }
        let asks: Vec<Ask> = turns
            .iter()
            .map(|(id, account, _)| Ask { account: Some(*id), ..locked(&account.meter).ask_less() })
            .collect();
        let answer = grants::take(&self.pool, self.process, &asks).await;
        let now = Instant::now();
        let (answer, ended) = match answer {
            Ok(answer) => (answer, Ok(())),
            Err(error) => (vec![None; turns.len()], Err(error)),
        };
        for ((_, account, _), given) in turns.iter().zip(answer) {
            match given {
                Some(given) => locked(&account.meter).answered(&given, now),
                None => locked(&account.meter).unanswered(),
            }
        }
        ended
    }
}
