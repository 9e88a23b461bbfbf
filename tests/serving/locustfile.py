"""Users of a server for locust: a picture of its own in each request; every third hangs up while its answer streams."""

import base64
import io
import itertools

from locust import HttpUser, constant, task
from PIL import Image

_numbers = itertools.count()


class Reader(HttpUser):
    """Asks about one picture after another."""

    wait_time = constant(0)

    @task
    def ask(self) -> None:
        """Read an answer, or its first two lines."""
        number = next(_numbers)
        file = io.BytesIO()
        Image.new("RGB", (84, 56), tuple(number.to_bytes(3, "little"))).save(file, "PNG")
        image = {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
        body = {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": image}]}],
            "stream": True,
            "ignore_eos": True,
            "max_tokens": 24,
        }
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"{response.status_code}: {response.text}")
                return
            lines = response.iter_lines()
            if number % 3 == 2:
                next(lines), next(lines)
                response.close()
            elif [*lines][-2:] != [b"data: [DONE]", b""]:
                response.failure("the stream has no end")
