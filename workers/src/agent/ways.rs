//! The models that an agent may ask: its own, and those that stand in for it.

use std::time::Duration;

use capx_core::domain::outcome::Failure;
use capx_core::store::agents::AgentRow;
use serde_json::Value;

use crate::adapters::Adapter;
use crate::handlers::{Hands, StepCall};

/// How many other models an agent may name.
const FALLBACKS_MAX: usize = 5;

/// A model, and how it is asked.
pub(super) struct Way {
    pub adapter: Box<dyn Adapter>,
    pub model: String,
    /// When it is asked in the place of those before it.
    pub on: Vec<On>,
}

/// Why another model is asked than the agent's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum On {
    /// The account with the provider has no money left.
    Quota,
    /// The provider does not answer, or takes nothing.
    Outage,
    /// What the agent may spend is not enough for it.
    Budget,
}

impl On {
    const ALL: [(&'static str, Self); 3] = [("quota", Self::Quota), ("outage", Self::Outage), ("budget", Self::Budget)];

    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, on)| *on)
    }
}

/// The models that the agent's step may ask: its own, then those of `config.fallback`, a list of
/// `{adapter?, model?, on?: [quota, outage, budget]}`. A step that names its model means that
/// one.
pub(super) fn ways(hands: &Hands, call: &StepCall<'_>, agent: &AgentRow) -> Result<Vec<Way>, Failure> {
    let name = call.step.adapter.as_deref().unwrap_or(&agent.adapter);
    let adapter = hands.providers.adapter(name).map_err(Failure::invalid)?;
    // A model belongs to its adapter: that of the agent is not asked of another one.
    let own = (name == agent.adapter).then_some(agent.model.as_deref()).flatten();
    let model = call.step.model.as_deref().or(own).unwrap_or_else(|| adapter.model_of(&agent.role)).to_owned();
    let mut ways = vec![Way { adapter, model, on: Vec::new() }];
    if call.step.model.is_some() {
        return Ok(ways);
    }
    for other in agent.config.get("fallback").and_then(Value::as_array).into_iter().flatten().take(FALLBACKS_MAX) {
        let name = other["adapter"].as_str().unwrap_or(&agent.adapter);
        let adapter =
            hands.providers.adapter(name).map_err(|why| Failure::invalid(format!("config.fallback: {why}")))?;
        let model = other["model"].as_str().unwrap_or_else(|| adapter.model_of(&agent.role)).to_owned();
        let named = other["on"].as_array().map(|on| on.iter().filter_map(|on| On::from_name(on.as_str()?)).collect());
        let on = named.unwrap_or_else(|| On::ALL.iter().map(|(_, on)| *on).collect());
        ways.push(Way { adapter, model, on });
    }
    Ok(ways)
}

/// Those who wait for the same do not all come back at once.
pub(super) fn spread(delay: Duration) -> Duration {
    delay + delay.mul_f64(rand::random_range(0.0..0.2)) + Duration::from_millis(rand::random_range(0..200))
}
