//! Who does a step that is no tool: the role's agent, through its adapter.

use capx_core::domain::outcome::{Failure, Outcome};
use capx_core::store::agents::AgentRow;

use crate::handlers::{Hands, StepCall};

pub mod custom;
mod offline;

/// Which models may be asked.
#[derive(Debug, Clone, Default)]
pub struct Providers {
    /// The built-in offline model stands in for every provider.
    pub offline: bool,
    /// A key for Anthropic is configured.
    pub anthropic: bool,
    /// A key for OpenAI is configured.
    pub openai: bool,
}

/// An adapter by any of its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adapter {
    /// Anthropic.
    Claude,
    /// OpenAI and what speaks like it.
    OpenAi,
    /// An HTTP endpoint of the owner's.
    Custom,
}

impl Adapter {
    /// From the name in a request or a playbook.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "claude" | "anthropic" => Some(Self::Claude),
            "gpt" | "openai" => Some(Self::OpenAi),
            "custom" | "http" => Some(Self::Custom),
            _ => None,
        }
    }

    /// The names that requests may use.
    pub const NAMES: &'static [&'static str] = &["claude", "gpt", "openai", "custom", "http"];
}

/// Asks the agent of the step's role.
pub async fn ask(hands: &Hands, call: StepCall<'_>) -> Outcome {
    let role = call.step.role.as_deref().unwrap_or_default();
    let Some(agent) = call.agent else {
        return Outcome::failed(Failure::invalid(format!(
            "no agent of this company has the role `{role}`; add one, or correct the playbook's role"
        )));
    };
    if agent.status == "errored" {
        let why = agent.error.as_deref().unwrap_or("no reason is known");
        return Outcome::failed(Failure::invalid(format!("the agent `{role}` is errored: {why}")));
    }
    let name = call.step.adapter.as_deref().unwrap_or(&agent.adapter);
    match Adapter::from_name(name) {
        Some(Adapter::Custom) => custom::ask(hands, call, agent).await,
        Some(Adapter::Claude | Adapter::OpenAi) if hands.providers.offline => offline::answer(&call, agent),
        Some(adapter) => {
            let why = provider_trouble(&hands.providers, adapter).unwrap_or_default();
            Outcome::failed(Failure::invalid(why))
        }
        None => Outcome::failed(Failure::invalid(format!("there is no adapter `{name}`"))),
    }
}

/// Why an agent cannot work here, or nothing.
pub fn cannot_work(providers: &Providers, agent: &AgentRow) -> Option<String> {
    match Adapter::from_name(&agent.adapter) {
        None => Some(format!("there is no adapter `{}`; use one of {}", agent.adapter, Adapter::NAMES.join(", "))),
        Some(Adapter::Custom) => match agent.config.get("endpoint").and_then(|v| v.as_str()) {
            Some(_) => None,
            None => Some("the adapter needs `config.endpoint`, the URL that it calls".into()),
        },
        Some(_) if providers.offline => None,
        Some(adapter) => provider_trouble(providers, adapter),
    }
}

fn provider_trouble(providers: &Providers, adapter: Adapter) -> Option<String> {
    let (variable, configured) = match adapter {
        Adapter::Claude => ("ANTHROPIC_API_KEY", providers.anthropic),
        Adapter::OpenAi => ("OPENAI_API_KEY", providers.openai),
        Adapter::Custom => return None,
    };
    Some(if configured {
        "this version reaches models through the `custom` adapter only; give the agent one, or set CAPX_OFFLINE_MODEL=1 to try playbooks without a model".into()
    } else {
        format!(
            "{variable} is not set; set it and restart the workers, or set CAPX_OFFLINE_MODEL=1 to try playbooks without a model"
        )
    })
}
