"""Before any training, on a network of one's own: will ln pi(y+) fall, who gains, and how far the forecast is good."""

from sims.language.outlook.forecast import outlook
from sims.language.outlook.record import Outlook
from sims.language.outlook.texts import Question, ask

__all__ = ["Outlook", "Question", "ask", "outlook"]
