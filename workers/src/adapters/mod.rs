//! The ways to a model: each turns one form of a conversation into what its provider
//! speaks, and the answer back.

use std::time::Duration;

use capx_core::domain::agent::message::{Message, Reply};
use capx_core::domain::agent::price::Prices;
use capx_core::domain::duration;
use capx_core::domain::money::Nanos;
use capx_core::domain::outcome::Failure;
use capx_core::store::agents::AgentRow;
use futures_util::future::BoxFuture;
use serde_json::{Map, Value};

use crate::egress::Egress;

mod claude;
mod custom;
mod offline;
mod openai;
mod provider;
mod sse;

pub use claude::BASE_URL as ANTHROPIC_BASE_URL;
pub use openai::BASE_URL as OPENAI_BASE_URL;
pub use provider::Account;

/// The largest answer of a model, in bytes: it is read as a whole.
pub const ANSWER_BYTES_MAX: usize = 10 * 1024 * 1024;
/// The time of one turn where the agent's `config.timeout` names none.
const TURN_TIMEOUT: Duration = Duration::from_secs(600);
/// What a model may say in one turn, in tokens, where nothing else is said.
const MAX_TOKENS: u64 = 4_096;
/// The same, whatever is said.
const MAX_TOKENS_MAX: u64 = 128_000;

/// When the offline model answers in the place of a provider's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Offline {
    /// It never does.
    #[default]
    Never,
    /// Where no key of the provider is set.
    WithoutKey,
    /// It always does.
    Always,
}

/// Which models may be asked, and what they cost.
#[derive(Debug, Clone)]
pub struct Providers {
    /// When the built-in model stands in for them.
    pub offline: Offline,
    /// Anthropic, where a key is set.
    pub anthropic: Option<Account>,
    /// OpenAI, or what speaks like it, where a key is set.
    pub openai: Option<Account>,
    /// What models cost.
    pub prices: Prices,
}

impl Default for Providers {
    fn default() -> Self {
        Self { offline: Offline::default(), anthropic: None, openai: None, prices: Prices::list() }
    }
}

impl Providers {
    /// None but the offline model, which answers for all.
    pub fn offline() -> Self {
        Self { offline: Offline::Always, ..Self::default() }
    }
}

/// A tool that a model may ask for.
#[derive(Debug)]
pub struct Offer<'a> {
    /// Its name: nothing but letters, digits, `_` and `-`.
    pub name: String,
    /// What it does.
    pub description: &'a str,
    /// The JSON Schema of its arguments.
    pub schema: &'a Value,
}

/// What a model is asked.
#[derive(Debug)]
pub struct Ask<'a> {
    /// Who asks.
    pub agent: &'a AgentRow,
    /// Which model.
    pub model: &'a str,
    /// How it is to behave.
    pub system: &'a str,
    /// What was said so far.
    pub messages: &'a [Message],
    /// What it may ask for.
    pub tools: &'a [Offer<'a>],
    /// What it may say, in tokens.
    pub max_tokens: u64,
    /// The same whenever this turn is asked for.
    pub key: &'a str,
    /// It must have answered by then.
    pub timeout: Duration,
    /// Something must come so often.
    pub idle: Duration,
    /// The task itself, for endpoints that are not given words.
    pub task: &'a Task<'a>,
}

/// A piece of work as it was given, before it was put into words.
#[derive(Debug)]
pub struct Task<'a> {
    /// `co_…`
    pub company: String,
    /// `run_…`
    pub run: String,
    /// The playbook's name.
    pub playbook: &'a str,
    /// The id of the step.
    pub step: &'a str,
    /// What is to be done.
    pub action: &'a str,
    /// With what.
    pub params: &'a Value,
    /// What a draft before lacked.
    pub feedback: Option<&'a Value>,
    /// What the agent remembers.
    pub memory: &'a Map<String, Value>,
}

/// A turn that came.
#[derive(Debug)]
pub struct Answered {
    /// What the model said.
    pub reply: Reply,
    /// What it cost, where the other side says so.
    pub cost: Option<Nanos>,
    /// What it wants to remember, by name; null forgets.
    pub memory: Map<String, Value>,
}

/// A turn that did not come.
#[derive(Debug)]
pub struct Trouble {
    /// Why.
    pub failure: Failure,
    /// The provider takes nothing for so long, from anybody with the same key.
    pub closed_for: Option<Duration>,
    /// The other side may have done the work all the same.
    pub maybe_paid: bool,
    /// The account has no money left with the provider.
    pub quota: bool,
    /// No call is any better before the agent's owner mends something: its endpoint refuses its key,
    /// say. What the operator's own keys are refused is no matter of the agent.
    pub fatal: bool,
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self { failure, closed_for: None, maybe_paid: false, quota: false, fatal: false }
    }
}

/// How the turns of an adapter are paid for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payment {
    /// By the table of prices.
    Priced,
    /// As the other side says with its answer; it knows a turn that is asked for again by its
    /// key.
    Told,
    /// Not at all.
    Free,
}

/// A way to a model.
pub trait Adapter: Send + Sync {
    /// One turn.
    fn turn<'a>(&'a self, egress: &'a Egress, ask: &'a Ask<'a>) -> BoxFuture<'a, Result<Answered, Trouble>>;

    /// The model that is asked where nobody names one.
    fn default_model(&self) -> &'static str;

    /// The same for an agent of a role.
    fn model_of(&self, _role: &str) -> &'static str {
        self.default_model()
    }

    /// Whose refusals hold for everybody: the account with the provider, where there is one.
    fn gate(&self) -> Option<String> {
        None
    }

    /// How long one turn may take where the agent does not say.
    fn default_timeout(&self) -> Duration {
        TURN_TIMEOUT
    }

    /// How what it says is paid for.
    fn payment(&self) -> Payment {
        Payment::Priced
    }
}

/// Which kind of adapter goes by a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Claude,
    OpenAi,
    Custom,
}

impl Kind {
    fn from_name(name: &str) -> Option<Self> {
        match name {
            "claude" | "anthropic" => Some(Self::Claude),
            "gpt" | "openai" => Some(Self::OpenAi),
            "custom" | "http" => Some(Self::Custom),
            _ => None,
        }
    }
}

/// The names that requests may use.
pub const NAMES: &[&str] = &["claude", "anthropic", "gpt", "openai", "custom", "http"];

impl Providers {
    /// The adapter of a name, or why it cannot be used here.
    pub fn adapter(&self, name: &str) -> Result<Box<dyn Adapter>, String> {
        let (account, variable): (Option<Box<dyn Adapter>>, _) = match Kind::from_name(name) {
            None => return Err(format!("there is no adapter `{name}`; use one of {}", NAMES.join(", "))),
            Some(Kind::Custom) => return Ok(Box::new(custom::Custom)),
            Some(Kind::Claude) => (
                self.anthropic.clone().map(|account| Box::new(claude::Claude(account)) as Box<dyn Adapter>),
                "ANTHROPIC_API_KEY",
            ),
            Some(Kind::OpenAi) => (
                self.openai.clone().map(|account| Box::new(openai::OpenAi(account)) as Box<dyn Adapter>),
                "OPENAI_API_KEY",
            ),
        };
        match (self.offline, account) {
            (Offline::Always, _) | (Offline::WithoutKey, None) => Ok(Box::new(offline::OfflineModel)),
            (_, Some(account)) => Ok(account),
            (Offline::Never, None) => Err(format!(
                "{variable} is not set; set it and restart the workers, or set CAPX_OFFLINE_MODEL=1 to try playbooks without a model"
            )),
        }
    }

    /// Why an agent cannot work here, or nothing.
    pub fn cannot_work(&self, agent: &AgentRow) -> Option<String> {
        if Kind::from_name(&agent.adapter) == Some(Kind::Custom) && custom::endpoint(agent).is_err() {
            return Some("the adapter needs `config.endpoint`, the URL that it calls".into());
        }
        self.adapter(&agent.adapter).err()
    }
}

/// How long a turn may take by an agent's settings.
pub(crate) fn turn_timeout(adapter: &dyn Adapter, agent: &AgentRow) -> Result<Duration, Failure> {
    match agent.config.get("timeout").and_then(Value::as_str) {
        None => Ok(adapter.default_timeout()),
        Some(text) => duration::parse(text).map_err(|e| Failure::invalid(format!("config.timeout: {e}"))),
    }
}

/// What a model may say in one turn, by an agent's settings, in tokens.
pub(crate) fn max_tokens(agent: &AgentRow) -> u64 {
    let said = agent.config.get("max_tokens").and_then(Value::as_u64);
    said.filter(|tokens| *tokens > 0).unwrap_or(MAX_TOKENS).min(MAX_TOKENS_MAX)
}
